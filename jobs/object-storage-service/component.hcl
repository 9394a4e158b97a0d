# Hands out uploads into the site's object store, on the first server. A site with
# object_store needs it. Its artifact reaches the hosts by SSH always, so that it can
# be repaired when the store is broken.
artifact "object-storage-service" {
  embedded = "object-storage-service"
}

# The store's keys. With a provider in object_store, `site provider
# rotate-object-storage` makes all four and nothing is imported; otherwise they come
# from whoever runs the store.
secret "r2.admin_access_key_id" {
  description = "id of the key that writes the bucket"
  external {}
}

secret "r2.admin_secret_access_key" {
  description = "the key that writes the bucket"
  external {}
}

# Hosts log in with their own key and read these two, and no other secret.
secret "r2.proxy_access_key_id" {
  description = "id of the key that reads the bucket"
  external {}
}

secret "r2.proxy_secret_access_key" {
  description = "the key that reads the bucket"
  external {}
}

# The provider's API tokens, each of which makes the other's next one. No job reads
# them, and a deploy does not ask for them; there are none without a provider.
secret "provider.admin_token_a" {
  description = "API token A of the provider, see `site provider import-admin-pair`"
  external {}
}

secret "provider.admin_token_b" {
  description = "API token B of the provider, see `site provider import-admin-pair`"
  external {}
}
