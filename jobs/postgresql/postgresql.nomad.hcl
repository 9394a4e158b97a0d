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
  default = 512
}

variable "shared_buffers" {
  type    = string
  default = "128MB"
}

variable "max_connections" {
  type    = number
  default = 100
}

job "postgresql" {
  type     = "service"
  priority = 90

  constraint {
    attribute = "${node.unique.name}"
    value     = var.server
  }

  group "postgresql" {
    network {
      mode = "host"
      # Also keeps a second server away: two on the same data would destroy it.
      port "postgresql" {
        static = 5432
      }
    }

    # A server that replays its log for some minutes is not a failed one.
    update {
      max_parallel      = 1
      min_healthy_time  = "1s"
      healthy_deadline  = "5m"
      progress_deadline = "10m"
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
      name     = "postgresql"
      provider = "nomad"
      port     = "postgresql"
      address  = "127.0.0.1"

      # The port is open from the start, and while the log is replayed after a
      # crash. No check restarts the task: that would begin the replay again.
      check {
        type     = "tcp"
        interval = "2s"
        timeout  = "3s"
      }
    }

    task "postgresql" {
      driver = "podman"
      # The image says by which signal. A client may allow less than this.
      kill_timeout = "60s"

      config {
        image      = var.artifacts["postgresql"]
        entrypoint = ["/site-host"]
        args = [
          "postgresql", "run", "--data", "/var/lib/postgresql/data", "--bin", "/usr/lib/postgresql/15/bin",
          "--", "-c", "config_file=/local/postgresql.conf",
        ]
        network_mode    = "host"
        readonly_rootfs = true
        cap_drop        = ["ALL"]
        security_opt    = ["no-new-privileges"]
        tmpfs           = ["/tmp"]
        shm_size        = "256m"
        volumes = [
          "/var/lib/postgresql:/var/lib/postgresql",
          "/run/postgresql:/run/postgresql",
          "/etc/site-postgresql:/etc/site-postgresql:ro",
          "/opt/site/bin/site-host:/site-host:ro",
          # Who connects to the socket is looked up by number.
          "/etc/passwd:/etc/passwd:ro",
          "/etc/group:/etc/group:ro",
        ]
      }

      # Changes only with the job: then the task is made anew.
      template {
        destination = "local/postgresql.conf"
        change_mode = "noop"
        perms       = "0644"
        data        = <<-EOT
          listen_addresses        = '127.0.0.1'
          port                    = 5432
          unix_socket_directories = '/run/postgresql'
          hba_file                = '/etc/site-postgresql/pg_hba.conf'
          ident_file              = '/etc/site-postgresql/pg_ident.conf'
          max_connections         = ${var.max_connections}
          shared_buffers          = '${var.shared_buffers}'
          dynamic_shared_memory_type = posix

          # Loopback only.
          ssl                 = off
          password_encryption = 'scram-sha-256'

          # The image has no compiler for queries.
          jit = off

          # A backend that crashes takes the others along, not the container.
          restart_after_crash = on

          logging_collector = off
          log_destination   = 'stderr'
          log_line_prefix   = '%m [%p] %q%u@%d '
          log_timezone      = 'UTC'
          timezone          = 'UTC'
          # Statements that set a password would be in there.
          log_statement              = 'none'
          log_min_duration_statement = -1
          log_min_error_statement    = panic
        EOT
      }

      resources {
        cpu    = 200
        memory = var.memory
      }
    }
  }
}
