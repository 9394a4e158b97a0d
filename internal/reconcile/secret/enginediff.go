package secret

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// The kinds of changes to the engine.
const (
	KindAudit  = "audit device"
	KindMount  = "mount"
	KindAuth   = "auth method"
	KindPolicy = "policy"
	KindRole   = "identity role"
)

// DiffEngine compares what the site wants of the engine with what was
// observed, in the order in which it is to be applied.
func DiffEngine(want Engine, have EngineState) []plan.Change {
	var changes []plan.Change
	add := func(kind, target string, exists bool, differs []string) {
		change := plan.Change{Action: plan.Update, Kind: kind, Target: target}
		switch {
		case !exists:
			change.Action, change.Reason = plan.Create, "missing"
		case len(differs) == 1:
			change.Reason = differs[0] + " differs"
		case len(differs) > 1:
			change.Reason = strings.Join(differs, ", ") + " differ"
		default:
			return
		}
		changes = append(changes, change)
	}
	for _, device := range want.Audit {
		found, exists := have.Audit[device.Path]
		add(KindAudit, device.Path, exists, append(differentType(device.Type, found.Type), differences(device.Options, found.Options)...))
	}
	addMount := func(kind string, mount Mount, observed map[string]Mount) {
		found, exists := observed[mount.Path]
		differs := differentType(mount.Type, found.Type)
		differs = append(differs, differences(mount.Tune, found.Tune)...)
		differs = append(differs, differences(mount.Config, found.Config)...)
		add(kind, mount.Path, exists, differs)
	}
	for _, mount := range want.Mounts {
		addMount(KindMount, mount, have.Mounts)
	}
	for _, name := range policyOrder(want.Policies) {
		text, exists := have.Policies[name]
		var differs []string
		if strings.TrimSpace(text) != strings.TrimSpace(want.Policies[name]) {
			differs = []string{"text"}
		}
		add(KindPolicy, name, exists, differs)
	}
	for _, mount := range want.Auth {
		addMount(KindAuth, mount, have.Auth)
	}
	for _, role := range want.Roles {
		found, exists := have.Roles[role.Target()]
		add(KindRole, role.Target(), exists, differences(role.Settings, found.Settings))
	}
	return append(changes, closedRotators(want, have)...)
}

// policyOrder puts the operators' own policy first: it may have to allow the
// changes that follow.
func policyOrder(policies map[string]string) []string {
	names := sortedKeys(policies)
	slices.SortStableFunc(names, func(a, b string) int {
		switch {
		case a == OperatorPolicy:
			return -1
		case b == OperatorPolicy:
			return 1
		}
		return 0
	})
	return names
}

// closedRotators are the deletions of what lets operators in that only rotate,
// where the site declares none any more. They wait for no --prune: the mount
// still takes the keys that were removed, and no operator may unmount it.
func closedRotators(want Engine, have EngineState) []plan.Change {
	if _, wanted := want.Policies[RotatorPolicy]; wanted {
		return nil
	}
	const reason = "no operator only rotates any more"
	var changes []plan.Change
	for _, target := range sortedKeys(have.Roles) {
		if have.Roles[target].Mount == RotatorsMount {
			changes = append(changes, plan.Change{Action: plan.Delete, Kind: KindRole, Target: target, Reason: reason})
		}
	}
	if _, exists := have.Policies[RotatorPolicy]; exists {
		changes = append(changes, plan.Change{Action: plan.Delete, Kind: KindPolicy, Target: RotatorPolicy, Reason: reason})
	}
	return changes
}

// StrayEngine are the deletions of what the site owns and no longer declares:
// policies of jobs, and roles of our auth methods. Without --prune they are
// only reported.
func StrayEngine(want Engine, have EngineState) []plan.Change {
	declared := map[string]bool{}
	ours := map[string]bool{}
	for _, role := range want.Roles {
		declared[role.Target()] = true
	}
	for _, mount := range want.Auth {
		ours[mount.Path] = true
	}
	var changes []plan.Change
	// Roles first: one without its policy would still let a job log in.
	for _, target := range sortedKeys(have.Roles) {
		if mount := have.Roles[target].Mount; ours[mount] && !declared[target] {
			changes = append(changes, plan.Change{Action: plan.Delete, Kind: KindRole, Target: target, Reason: strayReason(mount)})
		}
	}
	for _, name := range sortedKeys(have.Policies) {
		if _, wanted := want.Policies[name]; !wanted && strings.HasPrefix(name, JobPolicyPrefix) {
			changes = append(changes, plan.Change{Action: plan.Delete, Kind: KindPolicy, Target: name, Reason: strayReason(JobsMount)})
		}
	}
	return changes
}

func strayReason(mount string) string {
	if mount == JobsMount {
		return "no component declares it"
	}
	return "the site does not declare it"
}

// Foreign names what others made in the engine, sorted, as "mount scratch" or
// "policy team". It is never touched.
func Foreign(want Engine, have EngineState) []string {
	var found []string
	report := func(kind string, names, builtIn []string, wanted func(string) bool) {
		for _, name := range names {
			if !wanted(name) && !slices.Contains(builtIn, name) {
				found = append(found, kind+" "+name)
			}
		}
	}
	isOneOf := func(mounts []Mount) func(string) bool {
		return func(path string) bool {
			return slices.ContainsFunc(mounts, func(mount Mount) bool { return mount.Path == path })
		}
	}
	report(KindAudit, sortedKeys(have.Audit), nil, func(path string) bool {
		return slices.ContainsFunc(want.Audit, func(device AuditDevice) bool { return device.Path == path })
	})
	report(KindMount, sortedKeys(have.Mounts), []string{"sys", "identity", "cubbyhole", "agent-registry"}, isOneOf(want.Mounts))
	report(KindAuth, sortedKeys(have.Auth), []string{"token", RotatorsMount}, isOneOf(want.Auth))
	report(KindPolicy, sortedKeys(have.Policies), []string{"root", "default", "response-wrapping", "control-group"}, func(name string) bool {
		_, wanted := want.Policies[name]
		return wanted || strings.HasPrefix(name, JobPolicyPrefix) || name == RotatorPolicy
	})
	return found
}

func differentType(want, have string) []string {
	if want == have {
		return nil
	}
	return []string{"type"}
}

// differences names, sorted, the wanted fields that have another value. What a
// newer engine knows beyond them is its own business.
func differences(want, have Settings) []string {
	var fields []string
	for _, field := range sortedKeys(want) {
		if canonical(want[field]) != canonical(have[field]) {
			fields = append(fields, field)
		}
	}
	return fields
}

// canonical makes values comparable that mean the same: no value, an empty one
// and zero; lists in any order; numbers of any type; text (such as keys in PEM)
// with other whitespace.
func canonical(value any) string {
	raw, err := json.Marshal(value)
	if err != nil {
		return fmt.Sprintf("%#v", value)
	}
	decoder := json.NewDecoder(strings.NewReader(string(raw)))
	decoder.UseNumber()
	var plain any
	if err := decoder.Decode(&plain); err != nil {
		return string(raw)
	}
	return canonicalPlain(plain)
}

func canonicalPlain(value any) string {
	switch value := value.(type) {
	case nil:
		return ""
	case bool:
		if !value {
			return ""
		}
		return "true"
	case json.Number:
		if value.String() == "0" {
			return ""
		}
		return value.String()
	case string:
		text := strings.Join(strings.Fields(value), " ")
		if text == "false" { // options of mounts and audit devices are all text
			return ""
		}
		return text
	case []any:
		members := make([]string, len(value))
		for i, member := range value {
			members[i] = canonicalPlain(member)
		}
		slices.Sort(members)
		return strings.Join(members, "\n")
	case map[string]any:
		var members []string
		for _, key := range sortedKeys(value) {
			if text := canonicalPlain(value[key]); text != "" {
				members = append(members, fmt.Sprintf("%q=%q", key, text))
			}
		}
		return strings.Join(members, "\n")
	default:
		return fmt.Sprintf("%#v", value)
	}
}

func sortedKeys[V any](of map[string]V) []string {
	keys := make([]string, 0, len(of))
	for key := range of {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
