# The lab: real hosts on this machine, booted by `site lab up`. Nothing here is
# particular to a lab but the ssh configuration and the fingerprinters that must
# not look for a cloud.
site "lab" {
  ssh {
    config_file = ".lab/lab/ssh_config"
  }

  host "lab-1" {
    address = "lab-1"
  }

  operator "lab" {
    public_key_file = ".lab/lab/id.pub"
  }

  nomad {
    fingerprint_denylist = ["env_aws", "env_gce", "env_azure", "env_digitalocean"]
  }

  # The platform's own, which come with the program.
  component "openbao" {}
  component "postgresql" {}

  component "hello" {}
}
