package nomad

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
)

func jobWith(templates ...*api.Template) *api.Job {
	id, group := "shop", "web"
	return &api.Job{ID: &id, TaskGroups: []*api.TaskGroup{{Name: &group, Tasks: []*api.Task{{Name: "serve", Templates: templates}}}}}
}

func template(mode, content string) *api.Template {
	return &api.Template{ChangeMode: &mode, EmbeddedTmpl: &content}
}

func TestPin(t *testing.T) {
	const (
		read     = `{{ with secret "site/data/shop/key" }}{{ .Data.data.value }}{{ end }}`
		previous = `{{ with secret "site/data/shop/key?version=previous" }}{{ .Data.data.value }}{{ end }}`
		variable = `(nomadVar "nomad/jobs/shop/web/serve")`
	)
	live := func(item string) string {
		return `{{ with secret (printf "site/data/shop/key?version=%v" (or (and ` + variable + ` (index ` + variable + ` "` + item + `").Value) "0")) }}{{ .Data.data.value }}{{ end }}`
	}
	retiring := Pins{Active: map[string]int{"shop.key": 7}, Previous: map[string]int{"shop.key": 6}}
	tests := map[string]struct {
		mode, text  string
		pins        Pins
		want        string
		generations string
		live        string
	}{
		"a template that restarts its task names the generation": {
			mode: "restart", text: read, pins: retiring,
			want: strings.Replace(read, "key\"", "key?version=7\"", 1), generations: "map[shop.key:7]", live: "[]",
		},
		"one that runs a script does too": {
			mode: "script", text: read, pins: retiring,
			want: strings.Replace(read, "key\"", "key?version=7\"", 1), generations: "map[shop.key:7]", live: "[]",
		},
		"the previous generation has an entry of its own": {
			mode: "restart", text: read + previous, pins: retiring,
			want:        strings.Replace(read, "key\"", "key?version=7\"", 1) + strings.Replace(previous, "previous", "6", 1),
			generations: "map[shop.key:7 shop.key?version=previous:6]", live: "[]",
		},
		"while none is retiring the previous is the active one": {
			mode: "restart", text: previous, pins: Pins{Active: retiring.Active},
			want: strings.Replace(previous, "previous", "7", 1), generations: "map[shop.key?version=previous:7]", live: "[]",
		},
		"a template that signals looks the generation up": {
			mode: "signal", text: read, pins: retiring, want: live("site_generation:shop.key"), generations: "map[]",
			live: "[{nomad/jobs/shop/web/serve map[site_generation:shop.key:7]}]",
		},
		"one that does nothing looks the previous one up too": {
			mode: "noop", text: previous, pins: retiring, want: live("site_generation_previous:shop.key"), generations: "map[]",
			live: "[{nomad/jobs/shop/web/serve map[site_generation_previous:shop.key:6]}]",
		},
		"a secret without a generation stays": {
			mode: "restart", text: read, want: read, generations: "map[]", live: "[]",
		},
		"a text without secrets stays": {
			mode: "signal", text: `{{ env "HOME" }}`, pins: retiring, want: `{{ env "HOME" }}`, generations: "map[]", live: "[]",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			parsed := jobWith(template(test.mode, test.text))
			pinned, err := Pin(parsed, test.pins)
			if err != nil {
				t.Fatal(err)
			}
			if got := *pinned.Job.TaskGroups[0].Tasks[0].Templates[0].EmbeddedTmpl; got != test.want {
				t.Errorf("template\n%s\nwant\n%s", got, test.want)
			}
			if got := fmt.Sprint(pinned.Generations); got != test.generations {
				t.Errorf("generations %s, want %s", got, test.generations)
			}
			if got := fmt.Sprint(pinned.Live); got != test.live {
				t.Errorf("live %s, want %s", got, test.live)
			}
			if *parsed.TaskGroups[0].Tasks[0].Templates[0].EmbeddedTmpl != test.text {
				t.Error("the parsed job itself was changed")
			}
		})
	}
}

func TestALiveGenerationChangesNothingOfTheJob(t *testing.T) {
	const text = `{{ with secret "site/data/shop/key" }}{{ .Data.data.value }}{{ end }}`
	digest := func(mode string, generation int) string {
		pinned, err := Pin(jobWith(template(mode, text)), Pins{Active: map[string]int{"shop.key": generation}})
		if err != nil {
			t.Fatal(err)
		}
		prepared, err := Prepare(pinned.Job, Brief{Site: "lab", Component: "shop", Secrets: pinned.Generations})
		if err != nil {
			t.Fatal(err)
		}
		return prepared.Desired.SpecDigest
	}
	if digest("signal", 6) != digest("signal", 7) {
		t.Error("another generation of a signal template is another job")
	}
	if digest("restart", 6) == digest("restart", 7) {
		t.Error("another generation of a restart template is the same job")
	}
}

func TestCustomDelimitersArePinned(t *testing.T) {
	one := template("restart", `[[ with secret "site/data/shop/key" ]][[ .Data.data.value ]][[ end ]] {{ secret "site/data/shop/key" }}`)
	left, right := "[[", "]]"
	one.LeftDelim, one.RightDelim = &left, &right
	pinned, err := Pin(jobWith(one), Pins{Active: map[string]int{"shop.key": 7}})
	if err != nil {
		t.Fatal(err)
	}
	want := `[[ with secret "site/data/shop/key?version=7" ]][[ .Data.data.value ]][[ end ]] {{ secret "site/data/shop/key" }}`
	if got := *pinned.Job.TaskGroups[0].Tasks[0].Templates[0].EmbeddedTmpl; got != want {
		t.Errorf("template %s, want %s", got, want)
	}
}

func TestABrokenTemplateNamesItsTask(t *testing.T) {
	_, err := Pin(jobWith(template("restart", `{{ with secret "site/data/shop/key" }}`)), Pins{Active: map[string]int{"shop.key": 7}})
	if err == nil || !strings.Contains(err.Error(), "job shop, task serve, template 1") {
		t.Errorf("got %v, want the task's name", err)
	}
}

func TestWhatSpeaksAgainstACanary(t *testing.T) {
	service, batch, running, canaries := "service", "batch", "running", 1
	live := &api.Job{Status: &running}
	wanted := func(change func(*api.Job)) *api.Job {
		job := jobWith()
		job.Type = &service
		job.TaskGroups[0].Update = &api.UpdateStrategy{}
		if change != nil {
			change(job)
		}
		return job
	}
	volumes := func(mounts ...any) func(*api.Job) {
		return func(job *api.Job) {
			job.TaskGroups[0].Tasks[0].Config = map[string]any{"volumes": mounts}
		}
	}
	volume := func(request api.VolumeRequest) func(*api.Job) {
		return func(job *api.Job) { job.TaskGroups[0].Volumes = map[string]*api.VolumeRequest{"data": &request} }
	}
	tests := map[string]struct {
		wanted *api.Job
		live   *api.Job
		want   string
	}{
		"nothing against a service":            {wanted(nil), live, ""},
		"a job of another type":                {wanted(func(j *api.Job) { j.Type = &batch }), live, "it is a batch job"},
		"a job that does not run":              {wanted(nil), nil, "nothing of it runs yet"},
		"a volume that is written":             {wanted(volume(api.VolumeRequest{})), live, "writes to volume data"},
		"a volume that is only read":           {wanted(volume(api.VolumeRequest{ReadOnly: true})), live, ""},
		"a volume for each allocation":         {wanted(volume(api.VolumeRequest{PerAlloc: true})), live, ""},
		"a folder of the host":                 {wanted(volumes("/srv/data:/data")), live, "writes to the host's /srv/data"},
		"a folder of the host with options":    {wanted(volumes("/srv/data:/data:z,rw")), live, "writes to the host's /srv/data"},
		"a folder of the host, only read":      {wanted(volumes("/etc/ssl:/etc/ssl:z,ro")), live, ""},
		"a folder of the allocation":           {wanted(volumes("local/key:/key", "secrets/a:/a")), live, ""},
		"what the author has canaries of runs": {wanted(func(j *api.Job) { volumes("/srv:/srv")(j); j.TaskGroups[0].Update.Canary = &canaries }), live, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got := whyNoCanary(test.wanted, test.live)
			if test.want == "" && got != "" || !strings.Contains(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
