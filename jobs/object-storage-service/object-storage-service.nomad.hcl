# Names of artifacts → addresses by digest; filled in by the deploy.
variable "artifacts" {
  type = map(string)
}

# Filled in by the deploy, too.
variable "site" {
  type = string
}

# The host that it runs on; filled in by the deploy: the first server.
variable "server" {
  type = string
}

# These four follow from object_store of site.hcl.
variable "store_endpoint" {
  type = string
}

variable "store_region" {
  type = string
}

variable "store_bucket" {
  type = string
}

variable "store_path_style" {
  type = bool
}

# Jobs that may upload by their own identity, beside the operators.
variable "allowed_jobs" {
  type    = list(string)
  default = []
}

variable "memory" {
  type    = number
  default = 192
}

job "object-storage-service" {
  type = "service"
  # Deploys wait for it, and nothing that runs does.
  priority = 60

  constraint {
    attribute = "${node.unique.name}"
    value     = var.server
  }

  group "object-storage-service" {
    network {
      mode = "host"
      port "api" {
        static = 7390
      }
    }

    # One instance, which puts uploads in order: the old one is gone before the new
    # one comes. What was under way is tried again by those who upload.
    update {
      max_parallel      = 1
      min_healthy_time  = "1s"
      healthy_deadline  = "3m"
      progress_deadline = "5m"
      auto_revert       = true
    }

    restart {
      attempts = 20
      interval = "1m"
      delay    = "3s"
      mode     = "delay"
    }

    reschedule {
      delay          = "5s"
      delay_function = "constant"
      unlimited      = true
    }

    service {
      name     = "object-storage-service"
      provider = "nomad"
      port     = "api"
      address  = "127.0.0.1"

      # Healthy while the bucket is away, which no restart brings back.
      check {
        type     = "http"
        path     = "/healthz"
        interval = "2s"
        timeout  = "3s"
      }
    }

    task "object-storage-service" {
      driver       = "podman"
      kill_timeout = "20s"

      config {
        image           = var.artifacts["object-storage-service"]
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["ALL"]
        security_opt    = ["no-new-privileges"]
      }

      # By the job's own identity it reads these two secrets, and nothing else. The
      # templates do the reading: the task needs no token in its environment.
      vault {
        env = false
      }

      # Both halves in one file, so that nobody ever sees one half of a new pair. The
      # service reads it again when it changes, and whenever the store refuses what it
      # has: a rotation restarts nothing, and no upload fails.
      template {
        destination = "${NOMAD_SECRETS_DIR}/store_keys"
        change_mode = "noop"
        perms       = "0400"
        uid         = 65532
        gid         = 65532
        data        = <<-EOT
          {{ with secret "site/data/object-storage-service/r2.admin_access_key_id" }}{{ .Data.data.value }}{{ end }}
          {{ with secret "site/data/object-storage-service/r2.admin_secret_access_key" }}{{ .Data.data.value }}{{ end }}
        EOT
      }

      env {
        LISTEN           = "127.0.0.1:7390"
        SITE_NAME        = var.site
        STORE_ENDPOINT   = var.store_endpoint
        STORE_REGION     = var.store_region
        STORE_BUCKET     = var.store_bucket
        STORE_PATH_STYLE = var.store_path_style
        STORE_KEYS_FILE  = "/secrets/store_keys"
        OPENBAO_ADDR     = "http://127.0.0.1:8200"
        NOMAD_JWKS_URL   = "http://127.0.0.1:4646/.well-known/jwks.json"
        ALLOWED_JOBS     = join(",", var.allowed_jobs)
        GOMEMLIMIT       = "96MiB"
      }

      resources {
        cpu    = 100
        memory = var.memory
      }
    }
  }
}
