package deploy

import (
	"testing"
	"time"

	"github.com/nomad-site/site/internal/site"
)

// What the host keeps answers whether anything is due, or says to look closer.
func TestWhatIsDueIsSeenInTheHostsOwnSummary(t *testing.T) {
	now := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	at := func(ago time.Duration) string { return now.Add(-ago).Format(time.RFC3339) }
	aging := site.Secret{Component: "shop", Name: "key", Generated: &site.Generated{}, Rotation: &site.Rotation{Every: time.Hour}}
	ageless := site.Secret{Component: "shop", Name: "token", Generated: &site.Generated{}}
	made := func(ago time.Duration, metadata map[string]string) summary {
		return summary{Secrets: map[string]summaryEntry{"shop.key": {Version: 3, Created: now.Add(-ago), HasValue: true, Metadata: metadata}}}
	}
	for name, test := range map[string]struct {
		kept summary
		due  bool
	}{
		"made a while ago":                         {made(59*time.Minute, nil), false},
		"made so long ago":                         {made(time.Hour, nil), true},
		"made long ago, and rotated since":         {made(48*time.Hour, map[string]string{"rotated": at(59 * time.Minute)}), false},
		"rotated so long ago":                      {made(48*time.Hour, map[string]string{"rotated": at(time.Hour)}), true},
		"rotated so long ago, and written since":   {made(time.Minute, map[string]string{"rotated": at(time.Hour)}), false},
		"begun and not finished":                   {made(time.Minute, map[string]string{"active": "3", "candidate": "4", "since": at(0)}), true},
		"drained":                                  {made(time.Minute, map[string]string{"active": "3", "retiring": "2", "retire_after": at(0)}), true},
		"draining":                                 {made(48*time.Hour, map[string]string{"active": "3", "retiring": "2", "retire_after": at(-time.Second)}), false},
		"failed a while ago":                       {made(time.Minute, map[string]string{"active": "1", "failed": "2"}), false},
		"with no value any more":                   {summary{Secrets: map[string]summaryEntry{"shop.key": {Version: 3, Created: now.Add(-48 * time.Hour)}}}, false},
		"not known to the host, which may be old":  {summary{}, true},
		"another, that nobody declares any longer": {summary{Secrets: map[string]summaryEntry{"shop.key": made(0, nil).Secrets["shop.key"], "shop.gone": {Version: 1, Created: now.Add(-time.Hour), HasValue: true}}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if due := dueBySummary([]site.Secret{ageless, aging}, test.kept, now); due != test.due {
				t.Errorf("due: %t, want %t", due, test.due)
			}
		})
	}
	if dueBySummary([]site.Secret{ageless}, summary{}, now) {
		t.Error("a secret without a policy is due")
	}
}
