# Belongs to the reference beside it.
variable "artifacts" {
  type = map(string)
}

variable "site" {
  type = string
}

variable "count" {
  type = number
}

variable "settings" {
  type    = map(string)
  default = {}
}

job "example" {
  group "server" {
    count = var.count

    network {
      port "http" {}
    }

    task "server" {
      driver = "podman"

      # A file: fetched from the host's own artifact server, by digest.
      artifact {
        source      = var.artifacts["rules"]
        destination = "local/rules.json"
        mode        = "file"
      }

      config {
        # An image: pulled from there, by digest.
        image   = var.artifacts["server"]
        volumes = ["/srv/example:/data"]
      }

      env {
        SITE     = var.site
        SETTINGS = jsonencode(var.settings)
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
