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
# Three are given by every deploy to jobspecs that declare them, and cannot be set:
#   artifacts  map(string): the address, by digest, of each artifact below
#   site       string: the site's name
#   server     string: the name of the first host that is a server
variables = {
  count    = 1
  settings = { "log.level" = "info" }
}

# An artifact is bytes with a digest: an image that podman pulls or a file that
# Nomad's artifact block fetches, both from the host itself. Two components may
# declare the same one, then in the same words.
#
# Each has exactly one source: go_package, docker_archive, oci_layout, path, url,
# tool, deb_packages or embedded. All paths are relative to the repository's root.
artifact "server" {
  # "image" or "file". Default "image".
  kind = "image"

  # A main package, built static: ./path in this repository or an import path.
  go_package = "./jobs/hello/app"

  # The image's command. Default: the built executable; for archives and layouts,
  # what they say.
  entrypoint = ["/hello"]

  # The signal that asks a container to end; a task's kill_signal does not reach
  # one of podman. Default: the image's own, or SIGTERM.
  stop_signal = "SIGINT"

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

  # Which of the tool's files. Default: the tool's name. An image from path or url
  # may have it too: that one static executable, out of a tar or as it is, is put
  # alone into an image.
  executable = "versitygw"
}

# Debian packages with all they need, from the lock, as an image.
artifact "database" {
  deb_packages = ["postgresql-15"]
}

# An executable that site itself carries, alone in an image: for a repository that
# has its own jobs/object-storage-service. That is the only one there is.
artifact "uploads" {
  embedded = "object-storage-service"
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

# Secrets of other components ("COMPONENT.NAME") that the job reads, and own ones
# that it asks OpenBao for itself. Own ones that its templates read are found in
# the jobspec; own ones with a dot in their name are named in full, too. The job can read these and no others. What it asks for itself is
# the newest generation, as soon as it is written. Default: none.
reads = ["example.signing_key"]

# A secret is a name, and where its value comes from; values are never in git.
# The site needs the component "openbao". The name is 1 to 63 lower-case letters,
# digits and underscores, and one dot may stand between two such words; everyone
# else calls it "example.database_password". A template reads it as
#   {{ with secret "site/data/example/database_password" }}{{ .Data.data.value }}{{ end }}
# in a task with a vault block. Each deploy and each rotation chooses the
# generation that this reads: a new one is a change of the job, with canary and
# health as any other, but for a template with change_mode "signal" or "noop",
# which is rendered again without a restart. Who checks a value that others
# present reads the one before it too, at
#   "site/data/example/session_key?version=previous"
# which is the same as the other but for the time of a rotation.
#
# Each has exactly one source: generated, external or produced_by.
secret "database_password" {
  # What it is for, in lists and errors. Default: none.
  description = "password of the role example"

  # Made once by a deploy and never again by one.
  generated {
    # Random bytes, 16 to 1024. Default 32.
    length = 32

    # "base64url" (without padding), "base64" or "hex". Default "base64url".
    encoding = "base64url"
  }

  # When `site secrets rotate --due` makes a next generation. A secret that is
  # produced by a component has none, since that replaces it. Default: it is
  # rotated only when asked by name, and with the drain below.
  rotation {
    # The age at which it is due, 1h to 3650d. Days are 24 hours; "1d12h" is fine
    # too. What comes from outside has none: site secrets rotate NAME --from-file.
    # Default: only when asked.
    every = "30d"

    # How long the old generation stays good after all have the new one, 0s to
    # 24h. Longer than what a task keeps of it, such as a pool's connections.
    # Default "1m".
    drain = "10m"
  }
}

secret "signing_key" {
  generated {}
}

secret "session_key" {
  description = "what the clients of this server show to it"

  generated {}

  rotation {
    every = "7d"
  }
}

# Comes from outside: `site secrets import` or `site secrets set`.
secret "payment_key" {
  description = "key of the payment provider, from its console"

  external {
    # Proves that a value works: the command reads the value on standard input and
    # ends with 0. It runs where site runs, in the commit's tree. Default: any value
    # is accepted.
    check = ["./jobs/example/check-payment-key", "--quiet"]

    # A newline at the end of a value: "trim" cuts it off and says so, "keep" keeps
    # it. Default "trim".
    trailing_newline = "trim"
  }
}

# Made by someone else: either by a component's job, which writes it with its own
# identity and is healthy before this component starts …
secret "join_token" {
  produced_by {
    component = "hello"
  }
}

# … or by a command, whose output is the value. It runs where site runs, in the
# commit's tree, when there is no value yet.
secret "serial" {
  produced_by {
    command = ["uuidgen"]
  }
}

# A database of the site's Postgres, which needs the component "postgresql". Names
# of databases and roles are 1 to 63 lower-case letters, digits and underscores,
# and unique on the site.
database "example" {
  # Required: a role that an active component declares.
  owner = "example"

  # 0 to 10000, or -1 for no limit. Default -1.
  connection_limit = 50
}

role "example" {
  # Default false. Who can log in needs a password or peers.
  login = true

  # The secret that holds the password: its name in this component, or
  # "COMPONENT.NAME". Default: none.
  password = "database_password"

  # The password can be rotated without a gap: the role owns what it owns and no
  # longer logs in itself, and the logins example_a and example_b, which act as it,
  # take turns. The secret, which is that of no other role, then has the user name
  # too: {{ .Data.data.username }}. Such a role has no peers and no replication,
  # and a name of 61 characters at most. Default false.
  alternating = true

  # 0 to 10000, or -1 for no limit. Default -1.
  connection_limit = 20

  # Roles whose privileges it has too. Default: none.
  member_of = ["example_readers"]
}

role "example_backup" {
  login = true

  # May stream the write-ahead log. Default false.
  replication = true

  # Users of the host that log in as this role over the Unix socket, without a
  # password. Default: none.
  peers = ["backup"]
}

# A role to be a member of: nobody logs in as it.
role "example_readers" {}

# Privileges of a role, named by the label. They are in upper case as in SQL; ALL
# is every one that there is. This is on the database itself (CONNECT, CREATE,
# TEMPORARY).
grant "example_readers" {
  # Both required.
  database   = "example"
  privileges = ["CONNECT"]
}

# On a schema (CREATE, USAGE).
grant "example_readers" {
  database   = "example"
  schema     = "public"
  privileges = ["USAGE"]
}

# On what is in the schema: either tables, sequences or functions, by name, or "*"
# for all that there are. Tables have SELECT, INSERT, UPDATE, DELETE, TRUNCATE,
# REFERENCES and TRIGGER.
grant "example_readers" {
  database   = "example"
  schema     = "public"
  tables     = ["*"]
  privileges = ["SELECT"]

  # A role: what it makes later in this schema gets the same privileges. Default:
  # only what is there now.
  default_for = "example"
}

# Sequences have SELECT, UPDATE and USAGE.
grant "example_readers" {
  database   = "example"
  schema     = "public"
  sequences  = ["orders_id_seq"]
  privileges = ["SELECT"]
}

# Functions have EXECUTE, and are named with the types of their arguments.
grant "example_readers" {
  database   = "example"
  schema     = "public"
  functions  = ["total(integer, text)"]
  privileges = ["ALL"]
}
