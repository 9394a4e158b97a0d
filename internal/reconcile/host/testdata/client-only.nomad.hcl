# Written by site for host gamma-4. Changes made here are found and undone by the next deploy.
name       = "gamma-4"
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
  rpc  = "203.0.113.8"
  serf = "203.0.113.8"
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
  enabled          = false
}

client {
  enabled = true
  # A database gets the time to write its checkpoint.
  max_kill_timeout = "2m"
  # The interface of the address above: a host need not have a default route.
  network_interface = "{{ GetAllInterfaces | include \"address\" \"^203[.]0[.]113[.]8(/[0-9]+)?$\" | attr \"name\" }}"
  servers = ["203.0.113.5", "203.0.113.6", "203.0.113.7"]
  options {
    "fingerprint.denylist" = "env_aws,env_gce"
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
