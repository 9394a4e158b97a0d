# Names of artifacts → addresses by digest; filled in by the deploy.
variable "artifacts" {
  type = map(string)
}

variable "count" {
  type    = number
  default = 1
}

# 0 takes a free port: then a new allocation can start beside the old one.
variable "port" {
  type    = number
  default = 8080
}

# How long an allocation that is replaced still answers those who know its address.
variable "shutdown_delay" {
  type    = string
  default = "0s"
}

job "hello" {
  type = "service"

  group "hello" {
    count = var.count

    network {
      mode = "host"
      port "http" {
        static = var.port
      }
    }

    update {
      max_parallel      = 1
      min_healthy_time  = "1s"
      healthy_deadline  = "2m"
      progress_deadline = "5m"
      auto_revert       = true
    }

    # A task that keeps ending is reported soon, instead of retried for half an hour.
    restart {
      attempts = 2
      interval = "1m"
      delay    = "2s"
      mode     = "fail"
    }

    # After the host comes back, so does the job, without an operator.
    reschedule {
      delay          = "5s"
      delay_function = "constant"
      unlimited      = true
    }

    service {
      name     = "hello"
      provider = "nomad"
      port     = "http"

      check {
        type     = "http"
        path     = "/healthz"
        interval = "2s"
        timeout  = "1s"
      }
    }

    task "hello" {
      driver         = "podman"
      kill_timeout   = "10s"
      shutdown_delay = var.shutdown_delay

      config {
        image           = var.artifacts["hello"]
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["ALL"]
      }

      # By the job's own identity it reads what its policy names, and nothing else.
      # The template does the reading: the task needs no token in its environment.
      vault {
        env = false
      }

      # A new password comes with a new start.
      template {
        destination = "${NOMAD_SECRETS_DIR}/database_password"
        change_mode = "restart"
        perms       = "0400"
        uid         = 65532
        gid         = 65532
        data        = "{{ with secret \"site/data/hello/database_password\" }}{{ .Data.data.value }}{{ end }}"
      }

      # Whom the password logs in changes with it.
      template {
        destination = "${NOMAD_SECRETS_DIR}/database.env"
        env         = true
        data        = <<-EOT
          {{ with secret "site/data/hello/database_password" }}
          DATABASE_URL=postgres://{{ .Data.data.username }}@127.0.0.1:5432/hello?sslmode=disable&pool_max_conn_lifetime=5s
          {{ end }}
        EOT
      }

      env {
        DATABASE_PASSWORD_FILE = "/secrets/database_password"
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
