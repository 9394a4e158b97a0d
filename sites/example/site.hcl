# The reference of site.hcl: every field, with what it means and its default.
# A test decodes this file and insists that it has every field there is.
#
# site.hcl is decoded strictly: an unknown field, a duplicate or a reference to
# nothing is an error with its place, and all errors come in one run. Values are
# literals: there are no variables and no functions.

# Required, once. The label is the name of the folder: sites/example.
site "example" {
  # How long one whole rollout may take. Default "15m", at most "24h".
  deadline = "20m"

  # How many releases stay on the hosts, ready for a rollback. Default 5.
  keep_releases = 3

  # Nomad's names for where this is. Defaults "dc1" and "global".
  datacenter = "fra1"
  region     = "eu"

  # Optional.
  ssh {
    # An OpenSSH client configuration, relative to the repository's root. It need
    # not be in git. Left out: the user's own ~/.ssh/config.
    config_file = "sites/example/ssh_config"
  }

  # At least one. The label is the host's name in Nomad and in reports.
  host "gamma-1" {
    # Required: what SSH dials. An IP address, a DNS name, or a Host of the ssh
    # configuration.
    address = "gamma-1.example.net"

    # Default: what the ssh configuration says, else 22.
    port = 2222

    # Default: what the ssh configuration says, else your own login. A user other
    # than root needs sudo without a password.
    user = "deploy"

    # The IP address that the agents of several hosts reach each other at.
    # Default: the address of the interface with the default route.
    private_address = "10.0.0.11"

    # Runs a Nomad server. One, three or five hosts of a site do. Default: true on
    # the only host of a site, else false.
    server = true

    # Runs jobs. Default true.
    client = true

    # The host's public keys. A host that shows another key is refused. Keys in
    # sites/example/known_hosts and in the ssh configuration's
    # UserKnownHostsFile count too.
    host_keys = [
      "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzvoyAmo8fLnoExV7PWx0b06MfONnqdLRjF79hhOCIM",
    ]

    # A private key file for this host alone. Default: the ssh agent, then what the
    # ssh configuration says.
    identity_file = "~/.ssh/id_ed25519"
  }

  host "gamma-2" {
    address         = "192.0.2.12"
    private_address = "10.0.0.12"
  }

  # Who may log in, with the SSH key they have. Keys: ssh-ed25519,
  # ecdsa-sha2-nistp256, or ssh-rsa of at least 2048 bits.
  operator "alice" {
    # Either the key itself …
    public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIkP6UtB7xj780//mUMykuSidcHOtePSfASIZLhkzgkn"
  }

  operator "ci" {
    # … or a file with it, relative to the repository's root, read from the work tree.
    public_key_file = "sites/example/ci.pub"

    # "deploy" is everything; "rotate" is for a machine that rotates secrets when
    # they are due (`site secrets rotate --due`), and can do nothing else. One
    # operator at least must have "deploy". Default "deploy".
    rights = "rotate"
  }

  # A component is active because it is named here. The label is a folder under jobs/.
  component "example" {
    # Values for the variables of its jobspec. Each replaces, as a whole, the value
    # of the same name in component.hcl.
    variables = {
      count    = 2
      settings = { "log.level" = "debug" }
    }
  }

  component "hello" {}

  # The components that site itself brings: the store of the secrets and the
  # databases. They are needed where a component declares any.
  component "openbao" {}

  component "postgresql" {}

  # The service that uploads into the object store below: a site has both or neither.
  component "object-storage-service" {}

  # Optional: a bucket into which each deploy uploads what is new, once, and from
  # which hosts pull what they lack. Default: artifacts travel by SSH to each host.
  object_store {
    # Required, and of this site alone.
    bucket = "gamma-artifacts"

    # The address of an S3 API, without the bucket; https, but for an IP address of
    # one's own network. Required without cloudflare, where the default is the
    # account's own.
    endpoint = "https://0123456789abcdef0123456789abcdef.eu.r2.cloudflarestorage.com"

    # What requests are signed for. Default "auto" with cloudflare, else "us-east-1".
    region = "auto"

    # The bucket stands in the path, and not in front of the host name. Default true.
    path_style = true

    # An https address at which workstations reach the site's object-storage-service.
    # Default: through SSH.
    service_url = "https://uploads.example.net"

    # Cloudflare makes the store's keys; see `site provider`. Left out, any S3 will do,
    # and its keys are imported as the four secrets object-storage-service.r2.*.
    cloudflare {
      # Required: the id that the dashboard shows beside the account.
      account_id = "0123456789abcdef0123456789abcdef"

      # "eu" or "fedramp", as the bucket was made with. Default: none.
      jurisdiction = "eu"

      # The provider's API. Default: its own, https://api.cloudflare.com/client/v4.
      api = "https://api.cloudflare.com/client/v4"
    }
  }

  # Optional settings of the Nomad agents.
  nomad {
    # Fingerprinters that must not run, such as those that wait for a cloud's
    # metadata service. Default: none.
    fingerprint_denylist = ["env_aws", "env_gce"]
  }
}
