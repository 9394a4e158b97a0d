# Names of artifacts → addresses by digest; filled in by the deploy.
variable "artifacts" {
  type = map(string)
}

variable "count" {
  type    = number
  default = 1
}

variable "port" {
  type    = number
  default = 8080
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
      healthy_deadline  = "1m"
      progress_deadline = "2m"
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
      driver       = "podman"
      kill_timeout = "10s"

      config {
        image           = var.artifacts["hello"]
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["ALL"]
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
