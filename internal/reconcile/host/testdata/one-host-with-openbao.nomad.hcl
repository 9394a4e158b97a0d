# Written by site for host gamma-1. Changes made here are found and undone by the next deploy.
name       = "gamma-1"
region     = "global"
datacenter = "dc1"
data_dir   = "/var/lib/nomad"
plugin_dir = "/opt/site/nomad/plugins"
bind_addr  = "0.0.0.0"
log_level  = "INFO"

disable_update_check = true
leave_on_interrupt   = false
leave_on_terminate   = false

# The API is plain HTTP on loopback only: operators reach it through SSH.
addresses {
  http = "127.0.0.1"
}

advertise {
  http = "127.0.0.1"
  rpc  = "203.0.113.5"
  serf = "203.0.113.5"
}

acl {
  enabled = true
}

tls {
  http                   = false
  rpc                    = true
  ca_file                = "/etc/nomad.d/tls/ca.crt"
  cert_file              = "/etc/nomad.d/tls/agent.crt"
  key_file               = "/etc/nomad.d/tls/agent.key"
  verify_server_hostname = true
}

server {
  enabled          = true
  bootstrap_expect = 1
  # The client of this agent asks its own server first. Before an election a
  # server knows only what is in its latest snapshot of the state; without the
  # node in there the client is refused, and an agent that is merely restarted
  # ends the tasks that have services. The state of a site is small.
  raft_snapshot_threshold = 4
  raft_snapshot_interval  = "5s"
  server_join {
    retry_join     = ["203.0.113.5"]
    retry_interval = "2s"
  }
}

client {
  enabled = true
  # A database gets the time to write its checkpoint.
  max_kill_timeout = "2m"
  # The interface of the address above: a host need not have a default route.
  network_interface = "{{ GetAllInterfaces | include \"address\" \"^203[.]0[.]113[.]5(/[0-9]+)?$\" | attr \"name\" }}"
  servers = ["203.0.113.5"]
  # A task that runs keeps what it has while a secret cannot be read: after twelve
  # attempts, some minutes, Nomad would kill it.
  template {
    vault_retry {
      attempts = 0
    }
  }
}

# Tasks read secrets with their own identity; no token of ours is in between.
vault {
  enabled               = true
  address               = "http://127.0.0.1:8200"
  jwt_auth_backend_path = "jwt-nomad"
  create_from_role      = "nomad-workloads"

  default_identity {
    aud = ["vault.io"]
    ttl = "1h"
  }
}

plugin "nomad-driver-podman" {
  config {
    volumes {
      enabled = true
    }
    gc {
      container = true
    }
    recover_stopped = false
  }
}
