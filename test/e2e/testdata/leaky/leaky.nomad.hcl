variable "artifacts" {
  type = map(string)
}

job "leaky" {
  group "leaky" {
    network {
      mode = "host"
      port "http" {
        static = 8090
      }
    }

    update {
      min_healthy_time  = "1s"
      healthy_deadline  = "10s"
      progress_deadline = "20s"
      auto_revert       = true
    }

    restart {
      attempts = 1
      interval = "1m"
      delay    = "1s"
      mode     = "fail"
    }

    reschedule {
      attempts  = 0
      unlimited = false
    }

    service {
      name     = "leaky"
      provider = "nomad"
      port     = "http"

      check {
        type     = "http"
        path     = "/healthz"
        interval = "1s"
        timeout  = "1s"
      }
    }

    task "leaky" {
      driver       = "podman"
      kill_timeout = "2s"

      config {
        image        = var.artifacts["leaky"]
        network_mode = "host"
      }

      vault {}

      template {
        destination = "${NOMAD_SECRETS_DIR}/external"
        perms       = "0444"
        data        = "{{ with secret \"site/data/leaky/external\" }}{{ .Data.data.value }}{{ end }}"
      }

      template {
        destination = "${NOMAD_SECRETS_DIR}/others"
        perms       = "0444"
        data        = "{{ with secret \"site/data/leaky/generated\" }}{{ .Data.data.value }}{{ end }} {{ with secret \"site/data/leaky/produced\" }}{{ .Data.data.value }}{{ end }}"
      }

      env {
        MODE = "serve"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
