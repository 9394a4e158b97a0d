package secret

import "github.com/nomad-site/site/internal/site"

// operatorPolicy is what a deploy and `site secrets` need: to converge what
// the site owns, to read and write the catalogue, and to find and revoke
// tokens that were left behind. It cannot unmount anything, so no operator's
// mistake deletes the secrets of the site at once.
func operatorPolicy() string {
	all := rules{}
	all.allow(site.SecretMount+"/config", "create", "read", "update")
	all.allow(site.SecretMount+"/data/*", "create", "read", "update", "delete")
	all.allow(site.SecretMount+"/metadata", "list")
	all.allow(site.SecretMount+"/metadata/*", "create", "read", "update", "list")
	all.allow(site.SecretMount+"/undelete/*", "create", "update")
	all.allow(site.SecretMount+"/destroy/*", "create", "update")

	all.allow("sys/mounts", "read")
	all.allow("sys/mounts/"+site.SecretMount, "create", "read", "update")
	all.allow("sys/mounts/"+site.SecretMount+"/tune", "read", "create", "update")
	all.allow("sys/auth", "read")
	for _, mount := range []string{OperatorsMount, RotatorsMount, HostsMount, JobsMount} {
		all.allow("sys/auth/"+mount, "create", "read", "update", "sudo")
		// Auth methods are tuned at either of two paths.
		all.allow("sys/auth/"+mount+"/tune", "create", "read", "update", "sudo")
		all.allow("sys/mounts/auth/"+mount+"/tune", "create", "read", "update")
		all.allow("auth/"+mount+"/config", "create", "read", "update")
		all.allow("auth/"+mount+"/role", "list")
		all.allow("auth/"+mount+"/role/*", "create", "read", "update", "delete", "list")
	}
	all.allow("sys/audit", "read", "sudo")
	all.allow("sys/audit/"+AuditPath, "create", "update", "delete", "sudo")
	all.allow("sys/policies/acl", "list")
	all.allow("sys/policies/acl/", "list")
	all.allow("sys/policies/acl/"+JobPolicyPrefix+"*", "create", "read", "update", "delete")
	all.allow("sys/policies/acl/"+OperatorPolicy, "create", "read", "update")
	all.allow("sys/policies/acl/"+RotatorPolicy, "create", "read", "update", "delete")
	all.allow("sys/policies/acl/"+UploaderPolicy, "create", "read", "update", "delete")
	all.allow("sys/policies/acl/"+HostPolicy, "create", "read", "update")

	// To change the unseal key, where that takes a token; who does it proves
	// the old key too. Not sys/rotate/root itself, which asks for no key.
	all.allow("sys/rotate/root/init", "create", "read", "update", "delete")
	all.allow("sys/rotate/root/update", "create", "update")
	all.allow("sys/rotate/root/verify", "create", "read", "update", "delete")

	all.allow("sys/leases/lookup/auth/*", "list", "sudo")
	all.allow("auth/token/accessors", "list", "sudo")
	all.allow("auth/token/accessors/", "list", "sudo")
	all.allow("auth/token/lookup-accessor", "create", "update")
	all.allow("auth/token/revoke-accessor", "create", "update")
	all.allowOwnToken()
	return all.text("What operators of the site may do; made by site, changes are undone.")
}

// rotatorPolicy is what a rotation of the catalogue's secrets needs, and nothing
// of the engine itself: whoever steals a machine's key can read and replace
// values, and let nobody else in.
func rotatorPolicy() string {
	all := rules{}
	all.allow(site.SecretMount+"/data/*", "create", "read", "update")
	all.allow(site.SecretMount+"/metadata", "list")
	all.allow(site.SecretMount+"/metadata/*", "read", "update", "list")
	all.allow(site.SecretMount+"/destroy/*", "create", "update")
	all.allowOwnToken()
	return all.text("What operators of the site that only rotate may do; made by site, changes are undone.")
}

// uploaderPolicy is to be somebody, and nothing else.
func uploaderPolicy() string {
	all := rules{}
	all.allowOwnToken()
	return all.text("What shows the object-storage-service who an operator is; made by site, changes are undone.")
}

func (r rules) allowOwnToken() {
	r.allow("auth/token/lookup-self", "read")
	r.allow("auth/token/renew-self", "create", "update")
	r.allow("auth/token/revoke-self", "create", "update")
}

// hostPolicy is what a host's own key may do: know itself and, where the site has an
// object store, read the keys with which it pulls, and which generation is active.
func hostPolicy(s *site.Site) string {
	all := rules{}
	all.allow("auth/token/lookup-self", "read")
	if s.ObjectStore != nil {
		for _, name := range []string{site.StoreProxyID, site.StoreProxySecret} {
			one := site.Secret{Component: site.ObjectStorageComponent, Name: name}
			all.allow(dataPath(one), "read")
			all.allow(metadataPath(one), "read")
		}
	}
	return all.text("What hosts of the site may do; made by site, changes are undone.")
}
