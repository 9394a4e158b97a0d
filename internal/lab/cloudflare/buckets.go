package cloudflarefake

import (
	"cmp"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const r2Forbidden = "Authentication error"

var bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$`)

func isBucketName(name string) bool { return bucketName.MatchString(name) }

func jurisdictions() []string { return []string{"default", "eu", "fedramp"} }

func (f *Fake) routeBuckets(r *http.Request, rest []string) answer {
	permissions := []string{storageWrite}
	if r.Method == http.MethodGet {
		permissions = append(permissions, storageRead)
	}
	if no := f.allow(r, codeR2Forbidden, r2Forbidden, permissions...); no != nil {
		return *no
	}
	if f.options.R2Disabled {
		return refuse(http.StatusForbidden, codeR2Disabled, "Please enable R2 through the Cloudflare Dashboard.")
	}
	jurisdiction := cmp.Or(r.Header.Get("cf-r2-jurisdiction"), "default")
	if !slices.Contains(jurisdictions(), jurisdiction) {
		return refuse(http.StatusBadRequest, codeBadRequest, "there is no jurisdiction %q", jurisdiction)
	}
	switch {
	case r.Method == http.MethodGet && len(rest) == 0:
		return f.listBuckets(r, jurisdiction)
	case r.Method == http.MethodPost && len(rest) == 0:
		return f.createBucket(r, jurisdiction)
	case r.Method == http.MethodGet && len(rest) == 1:
		return f.getBucket(rest[0], jurisdiction)
	case r.Method == http.MethodDelete && len(rest) == 1:
		return f.deleteBucket(rest[0], jurisdiction)
	default:
		return refuse(http.StatusNotFound, 10015, "No route matches this url.")
	}
}

// find is for those who hold the mutex; -1: there is none.
func (f *Fake) find(name, jurisdiction string) int {
	return slices.IndexFunc(f.state.Buckets, func(b Bucket) bool { return b.Name == name && b.Jurisdiction == jurisdiction })
}

func (f *Fake) listBuckets(r *http.Request, jurisdiction string) answer {
	query := r.URL.Query()
	after, size := cmp.Or(query.Get("cursor"), query.Get("start_after")), 1000
	if value, err := strconv.Atoi(query.Get("per_page")); err == nil {
		size = value
	}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	shown := []Bucket{}
	for _, bucket := range f.state.Buckets {
		if bucket.Jurisdiction == jurisdiction && bucket.Name > after && strings.Contains(bucket.Name, query.Get("name_contains")) {
			shown = append(shown, bucket)
		}
	}
	slices.SortFunc(shown, func(a, b Bucket) int { return strings.Compare(a.Name, b.Name) })
	info := map[string]any{"per_page": size}
	if len(shown) > size {
		shown = shown[:size]
		info["cursor"] = shown[size-1].Name
	}
	listed := ok(map[string]any{"buckets": shown})
	listed.info = info
	return listed
}

func (f *Fake) createBucket(r *http.Request, jurisdiction string) answer {
	var body struct {
		Name         string `json:"name"`
		LocationHint string `json:"locationHint"`
		StorageClass string `json:"storageClass"`
	}
	if err := readBody(r, &body); err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "the body is not as documented: %v", err)
	}
	if !isBucketName(body.Name) {
		return refuse(http.StatusBadRequest, codeBadBucket, "The specified bucket name is not valid.")
	}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if f.find(body.Name, jurisdiction) >= 0 {
		return refuse(http.StatusConflict, codeBucketExists, "The bucket you tried to create already exists, and you own it.")
	}
	made := Bucket{Name: body.Name, Jurisdiction: jurisdiction, Created: f.options.Now().UTC().Truncate(time.Millisecond)}
	f.state.Buckets = append(f.state.Buckets, made)
	if err := f.save(); err != nil {
		return refuse(http.StatusInternalServerError, codeInternal, "%v", err)
	}
	return ok(made)
}

func (f *Fake) getBucket(name, jurisdiction string) answer {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	at := f.find(name, jurisdiction)
	if at < 0 {
		return refuse(http.StatusNotFound, codeNoBucket, "The specified bucket does not exist.")
	}
	return ok(f.state.Buckets[at])
}

func (f *Fake) deleteBucket(name, jurisdiction string) answer {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	at := f.find(name, jurisdiction)
	if at < 0 {
		return refuse(http.StatusNotFound, codeNoBucket, "The specified bucket does not exist.")
	}
	f.state.Buckets = slices.Delete(f.state.Buckets, at, at+1)
	if err := f.save(); err != nil {
		return refuse(http.StatusInternalServerError, codeInternal, "%v", err)
	}
	return ok(map[string]any{})
}
