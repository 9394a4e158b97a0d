# The application in ./app, built static and put alone into an image.
artifact "hello" {
  go_package = "./jobs/hello/app"
}

# Made once, by the first deploy; read by the job's template.
secret "database_password" {
  description = "the application's password at the database"
  generated {}
}

database "hello" {
  owner = "hello"
}

role "hello" {
  login    = true
  password = "database_password"
}
