# Names of artifacts → addresses by digest; filled in by the deploy.
variable "artifacts" {
  type = map(string)
}

# The host that holds the data; filled in by the deploy: the first server.
variable "server" {
  type = string
}

variable "memory" {
  type    = number
  default = 256
}

job "openbao" {
  type = "service"
  # Everything else waits for it.
  priority = 90

  constraint {
    attribute = "${node.unique.name}"
    value     = var.server
  }

  group "openbao" {
    network {
      mode = "host"
      port "api" {
        static = 8200
      }
      port "cluster" {
        static = 8201
      }
    }

    # Two servers cannot share the data: the old one is gone before the new one comes.
    update {
      max_parallel      = 1
      min_healthy_time  = "1s"
      healthy_deadline  = "3m"
      progress_deadline = "5m"
      auto_revert       = true
    }

    # Nothing else can take its place, so it is tried for ever. As many attempts as
    # fit into the interval: none has to wait for its end.
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
      name     = "openbao"
      provider = "nomad"
      port     = "api"
      address  = "127.0.0.1"

      # Healthy while it is not initialised or sealed: those who initialise and
      # unseal it come after its deployment.
      check {
        type     = "http"
        path     = "/v1/sys/health?uninitcode=200&sealedcode=200&standbyok=true"
        interval = "2s"
        timeout  = "3s"
      }
    }

    task "openbao" {
      driver       = "podman"
      kill_timeout = "20s"

      config {
        image           = var.artifacts["openbao"]
        args            = ["server", "-config=/local/openbao.hcl"]
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["ALL"]
        security_opt    = ["no-new-privileges"]
        tmpfs           = ["/tmp"]
        volumes = [
          "/var/lib/openbao:/openbao",
          "/var/log/openbao:/var/log/openbao",
        ]
      }

      # Changes only with the job: then the task is made anew.
      template {
        destination = "local/openbao.hcl"
        change_mode = "noop"
        perms       = "0644"
        data        = <<-EOT
          ui            = false
          disable_mlock = true
          log_level     = "info"
          api_addr      = "http://127.0.0.1:8200"
          cluster_addr  = "https://127.0.0.1:8201"

          listener "tcp" {
            address         = "127.0.0.1:8200"
            cluster_address = "127.0.0.1:8201"
            tls_disable     = true
          }

          storage "raft" {
            path    = "/openbao/data"
            node_id = "${var.server}"
            # There is nobody to wait for before it leads.
            performance_multiplier = 1
          }

          # Audit devices are by configuration where the server wants it so; one
          # that does not know this block is given the device through its API.
          audit "file" "file" {
            options {
              file_path = "/var/log/openbao/audit.log"
            }
          }
        EOT
      }

      resources {
        cpu    = 100
        memory = var.memory
      }
    }
  }
}
