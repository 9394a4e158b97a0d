# The application in ./app, built static and put alone into an image.
artifact "hello" {
  go_package = "./jobs/hello/app"
}

# Made by the first deploy; read by the job's template. `site secrets rotate` gives
# it a new generation every month, where a cron runs that with --due.
secret "database_password" {
  description = "the application's password at the database"
  generated {}

  rotation {
    every = "30d"
    drain = "1m"
  }
}

database "hello" {
  owner = "hello"
}

# Two logins, hello_a and hello_b, take turns, so that the password can change
# while the application runs; what either makes belongs to the role hello.
role "hello" {
  login       = true
  password    = "database_password"
  alternating = true
}
