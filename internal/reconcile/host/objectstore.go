package host

import (
	"encoding/json"
	"fmt"
)

// ObjectStorePath tells site-host from where it pulls what the host lacks. The
// file is there only where the site has an object store.
const ObjectStorePath = "/etc/site/object-store.json"

// ObjectStore is its content. The keys are not in it: site-host reads them from
// OpenBao by the host's own login.
type ObjectStore struct {
	Site      string `json:"site"`
	Host      string `json:"host"`
	Endpoint  string `json:"endpoint"`
	Region    string `json:"region"`
	Bucket    string `json:"bucket"`
	PathStyle bool   `json:"path_style"`
}

// addObjectStore adds the file where the site has an object store, and gives
// site-host's unit, whose template then finds the file's path among the values.
func (in Input) addObjectStore(document *Document, values map[string]any) (Unit, error) {
	unit := Unit{Name: SiteHostUnit, RestartOn: []string{SiteHostPath, siteHostUnitPath}}
	values["ObjectStorePath"] = ""
	store := in.Site.ObjectStore
	if store == nil {
		return unit, nil
	}
	content, err := json.MarshalIndent(ObjectStore{
		Site: in.Site.Name, Host: in.Host.Name,
		Endpoint: store.Endpoint, Region: store.Region, Bucket: store.Bucket, PathStyle: store.PathStyle,
	}, "", "  ")
	if err != nil {
		return Unit{}, fmt.Errorf("write %s: %w", ObjectStorePath, err)
	}
	document.Files = append(document.Files, newFile(ObjectStorePath, "0644", string(content)+"\n"))
	values["ObjectStorePath"] = ObjectStorePath
	unit.RestartOn = append(unit.RestartOn, ObjectStorePath)
	return unit, nil
}
