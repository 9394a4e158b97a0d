# Holds the site's databases, on the first server. Bringing it up needs no secret:
# the superuser logs in over the socket only, by who it is on the host.
artifact "postgresql" {
  deb_packages = ["postgresql-15", "pgbackrest"]
  user         = "5432:5432"

  # A fast shutdown: sessions end, then a checkpoint is written. On SIGTERM the
  # server would wait for its clients to go.
  stop_signal = "SIGINT"
}

directory "/var/lib/postgresql" {
  owner = "5432"
  group = "5432"
  mode  = "0700"
}

# The socket. Whoever may not log in is told so by the server.
directory "/run/postgresql" {
  owner = "5432"
  group = "5432"
}
