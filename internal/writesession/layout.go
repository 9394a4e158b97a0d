package writesession

import "github.com/nomad-site/site/internal/blob"

// Layout names the objects of one site in its bucket. Every key begins with the
// site's name.
type Layout struct{ Site string }

// Packs is the prefix of proven packs.
func (l Layout) Packs() string { return l.Site + "/packs/" }

// Pack is a proven pack, by the digest of its stored bytes.
func (l Layout) Pack(digest blob.Digest) string { return l.Packs() + digest.Hex() }

// Blobs is the prefix of records.
func (l Layout) Blobs() string { return l.Site + "/blobs/" }

// Blob is the record of a visible blob; see Record.
func (l Layout) Blob(digest blob.Digest) string { return l.Blobs() + digest.Hex() }

// Names is the prefix of artifacts' names.
func (l Layout) Names() string { return l.Site + "/names/" }

// Name is a published name: JSON of an Artifact.
func (l Layout) Name(artifact string, digest blob.Digest) string {
	return l.Names() + artifact + "/" + digest.Hex() + ".json"
}

// Sessions is the prefix of write sessions, open and ended.
func (l Layout) Sessions() string { return l.Site + "/sessions/" }

// Session is what a session was begun with, and End what it came to.
func (l Layout) Session(id string) string { return l.Sessions() + id + "/session.json" }

// End is written once, when the session completes or is aborted.
func (l Layout) End(id string) string { return l.Sessions() + id + "/end.json" }

// Staged is an upload that nobody has proven yet.
func (l Layout) Staged(id string, digest blob.Digest) string {
	return l.Sessions() + id + "/objects/" + digest.Hex()
}
