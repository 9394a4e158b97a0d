# The reference of component.hcl: every field, with what it means and its default.
# A test decodes this file and insists that it has every field there is. Nothing
# deploys this component but sites/example, which is no real site.

# Components that must be healthy first. They must be active on the same site.
# Default: none.
after = ["hello"]

# The job, a file of this folder. Default NAME.nomad.hcl with the component's own
# name. Its job block must have the component's name, and its tasks the driver
# podman.
jobspec = "example.nomad.hcl"

# Values for variables that the jobspec declares. Literals only. A site can
# replace each of them. A declared variable without a default must have a value.
# Two are given by every deploy to jobspecs that declare them, and cannot be set:
#   artifacts  map(string): the address, by digest, of each artifact below
#   site       string: the site's name
variables = {
  count    = 1
  settings = { "log.level" = "info" }
}

# An artifact is bytes with a digest: an image that podman pulls or a file that
# Nomad's artifact block fetches, both from the host itself. Two components may
# declare the same one, then in the same words.
#
# Each has exactly one source: go_package, docker_archive, oci_layout, path, url,
# tool or deb_packages. All paths are relative to the repository's root.
artifact "server" {
  # "image" or "file". Default "image".
  kind = "image"

  # A main package, built static: ./path in this repository or an import path.
  go_package = "./jobs/hello/app"

  # The image's command. Default: the built executable; for archives and layouts,
  # what they say.
  entrypoint = ["/hello"]

  # uid or uid:gid, in digits. Default "65532:65532" for images that are assembled
  # here; archives and layouts keep their own.
  user = "1000:1000"
}

# What `docker save`, Bazel, Nix or ko write.
artifact "worker" {
  docker_archive = "images/worker.tar"

  # Optional for docker_archive, oci_layout and path: bytes with another digest are
  # refused.
  sha256 = "3b4c2f0d8a5e6f7081923a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f"
}

# An OCI image layout: a folder or a tar of one.
artifact "frontend" {
  oci_layout = "images/frontend"
}

# A plain file of the repository.
artifact "rules" {
  kind = "file"
  path = "jobs/example/rules.json"
}

# A download, which needs its sha256.
artifact "model" {
  kind   = "file"
  url    = "https://downloads.example.net/model-3.bin"
  sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
}

# A pinned tool of the site's catalogue.
artifact "gateway" {
  tool = "versitygw"

  # Which of the tool's files. Default: the tool's name.
  executable = "versitygw"
}

# Debian packages with all they need, from the lock, as an image.
artifact "database" {
  deb_packages = ["postgresql-15"]
}

# A folder of the host for bind mounts. It is there before the job starts and
# after every reboot, below /run too. The label is its absolute path.
directory "/srv/example" {
  # An account or its number. Defaults "root".
  owner = "1000"
  group = "1000"

  # Octal text. Default "0755".
  mode = "0750"
}
