# Every tool that site builds or runs, pinned. A tool has exactly one source:
#
#   module    a folder here with tool.mod and tool.sum (a wrapper Go module),
#             built on the operator's machine with `package`, which is an import
#             path or the name of a file in the folder. `version` must be what
#             tool.mod pins: a test and the loader hold them together.
#   platform  blocks with url + sha256 (and `file`, the member of a .tar.gz or
#             .zip to take), or with debs, a lock of bootstrap/debs whose
#             packages are unpacked, or with path, an executable that is there.
#
# `environment` names variables (with *) that the tool may see when `site tool
# run` starts it; it sees no others beyond the few that every program needs.
# site.hcl can replace any tool by another url + sha256 or path.

tool "nomad" {
  version     = "1.11.3"
  description = "the scheduler: agent on every host, client for operators"
  module      = "nomad"
  package     = "github.com/hashicorp/nomad"
  tags        = ["release"] # without it the mock driver of Nomad's own tests is built in
  platforms   = ["linux/amd64", "linux/arm64"]
  environment = ["NOMAD_*"]
}

tool "nomad-driver-podman" {
  version     = "0.6.5"
  description = "task driver that lets Nomad run podman containers"
  module      = "nomad-driver-podman"
  package     = "github.com/hashicorp/nomad-driver-podman"
  platforms   = ["linux/amd64", "linux/arm64"]
}

tool "secrets-server" {
  version        = "1.14.1"
  version_module = "github.com/hashicorp/vault"
  description    = "server of the OpenBao API for labs and tests; real sites run OpenBao by url + sha256"
  module         = "secrets-server"
  package        = "main.go"
  platforms      = ["linux/amd64", "linux/arm64"]
}

tool "versitygw" {
  version     = "1.8.0"
  description = "S3 gateway over a folder: the lab's object store"
  module      = "versitygw"
  package     = "github.com/versity/versitygw/cmd/versitygw"
  variables   = { "main.Version" = "v1.8.0" }
  platforms   = ["linux/amd64", "linux/arm64"]
  environment = ["ROOT_ACCESS_KEY", "ROOT_SECRET_KEY", "VGW_*"]
}

tool "ansible" {
  version     = "2.14.18"
  description = "converges hosts; an unpacked closure of Debian packages with a Python of its own"
  executable  = "ansible-playbook"
  environment = ["ANSIBLE_*"]

  platform "linux/amd64" {
    debs = "ansible-debian-12-amd64.lock.json"
  }

  platform "linux/arm64" {
    debs = "ansible-debian-12-arm64.lock.json"
  }
}

tool "golangci-lint" {
  version     = "2.15.0"
  description = "the linters of make lint"
  module      = "golangci-lint"
  package     = "github.com/golangci/golangci-lint/v2/cmd/golangci-lint"
  variables   = { "main.version" = "2.15.0" }
  environment = ["PATH", "GO*", "CGO_*", "GOLANGCI_*", "SSL_CERT_*", "*_proxy", "*_PROXY"]
}

tool "gazelle" {
  version     = "0.53.0"
  description = "writes BUILD.bazel files"
  module      = "gazelle"
  package     = "github.com/bazelbuild/bazel-gazelle/cmd/gazelle"
  environment = ["PATH", "GO*", "SSL_CERT_*", "*_proxy", "*_PROXY"]
}

tool "buildifier" {
  version     = "0.0.0-20260904073137-eaa4d125b423"
  description = "formats BUILD.bazel files"
  module      = "buildifier"
  package     = "github.com/bazelbuild/buildtools/buildifier"
}
