artifact "leaky" {
  go_package = "./jobs/leaky/app"
}

secret "external" {
  external {
    check = ["sh", "jobs/leaky/check"]
  }
}

secret "generated" {
  generated {}
}

secret "produced" {
  produced_by {
    command = ["sh", "jobs/leaky/produce"]
  }
}

role "leaky" {
  login    = true
  password = "generated"
}
