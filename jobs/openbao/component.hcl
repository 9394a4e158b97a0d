# Holds the site's secrets, on the first server. Bringing it up needs no secret:
# the deploy initialises it, and site-host unseals it after a restart.
#
# The pinned server speaks the OpenBao API and is meant for labs. A real site runs
# OpenBao itself: it has a jobs/openbao/component.hcl of its own, equal to this one
# but for the source of the artifact, which is a release with its digest:
#
#   artifact "openbao" {
#     url        = "https://…/bao_2.4.1_Linux_x86_64.tar.gz"
#     sha256     = "…"
#     executable = "bao"
#     user       = "8200:8200"
#   }
artifact "openbao" {
  tool       = "secrets-server"
  executable = "secrets-server"
  user       = "8200:8200"
}

# All that is sealed.
directory "/var/lib/openbao" {
  owner = "8200"
  group = "8200"
  mode  = "0700"
}

# Who did what. Values are in there as keyed digests only.
directory "/var/log/openbao" {
  owner = "8200"
  group = "8200"
  mode  = "0750"
}
