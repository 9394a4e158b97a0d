# The application in ./app, built static and put alone into an image.
artifact "hello" {
  go_package = "./jobs/hello/app"
}
