//go:build embed_site_host

package hostbinary

import "embed"

//go:embed site-host-linux-amd64 site-host-linux-arm64
//go:embed object-storage-service-linux-amd64 object-storage-service-linux-arm64
var executables embed.FS
