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

      # The identity with which the templates below read their secrets. It is the
      # job's own, and may read what the job reads and nothing else.
      vault {}

      template {
        destination = "secrets/database.env"
        env         = true
        data        = <<-EOT
          {{ with secret "site/data/example/database_password" }}
          PGUSER={{ .Data.data.username }}
          PGPASSWORD={{ .Data.data.value }}
          {{ end }}
          {{ with secret "site/data/example/payment_key" }}
          PAYMENT_KEY={{ .Data.data.value }}
          {{ end }}
        EOT
      }

      # Both generations of what this server checks: its clients change one after
      # the other. A rotation renders it again and sends the signal.
      template {
        destination   = "secrets/session.keys"
        change_mode   = "signal"
        change_signal = "SIGHUP"
        data          = <<-EOT
          {{ with secret "site/data/example/session_key" }}{{ .Data.data.value }}{{ end }}
          {{ with secret "site/data/example/session_key?version=previous" }}{{ .Data.data.value }}{{ end }}
        EOT
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
