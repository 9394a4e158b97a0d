package role

import (
	"fmt"
	"strings"

	"github.com/nomad-site/site/internal/site"
)

// String is how reports call a place: `table shop.public.orders`.
func (p Place) String() string {
	if p.DefaultFor != "" {
		where := "database " + display(p.Database)
		if p.Schema != "" {
			where = "schema " + display(p.Database) + "." + display(p.Schema)
		}
		return fmt.Sprintf("%s that %s creates in %s", plural(p.Kind), display(p.DefaultFor), where)
	}
	parts := []string{display(p.Database)}
	if p.Schema != "" {
		parts = append(parts, display(p.Schema))
	}
	switch {
	case p.Kind == site.OnFunctions && functionIsPlain(p.Name):
		parts = append(parts, p.Name)
	case p.Name != "":
		parts = append(parts, display(p.Name))
	}
	if p.Column != "" {
		parts = append(parts, display(p.Column))
	}
	return string(p.Kind) + " " + strings.Join(parts, ".")
}

func functionIsPlain(name string) bool {
	return !strings.ContainsFunc(name, func(char rune) bool { return char < ' ' || char == '"' || char > '~' })
}

func plural(kind site.GrantObject) string {
	if kind == onSchemas {
		return string(kind)
	}
	return string(kind) + "s"
}

// canonicalName writes the argument types of a function as the server does.
func canonicalName(object site.GrantObject, name string) string {
	open := strings.IndexByte(name, '(')
	if object != site.OnFunctions || open < 0 || !strings.HasSuffix(name, ")") {
		return name
	}
	inner := strings.TrimSpace(name[open+1 : len(name)-1])
	if inner == "" {
		return name[:open] + "()"
	}
	types := strings.Split(inner, ",")
	for i, one := range types {
		one = strings.ToLower(strings.Join(strings.Fields(one), " "))
		element, isArray := strings.CutSuffix(one, "[]")
		if full := fullType(element); full != "" {
			one = full
			if isArray {
				one += "[]"
			}
		}
		types[i] = one
	}
	return name[:open] + "(" + strings.Join(types, ", ") + ")"
}

// fullType is the server's own name of a type that has a shorter one.
func fullType(name string) string {
	switch name {
	case "int", "int4":
		return "integer"
	case "int8":
		return "bigint"
	case "int2":
		return "smallint"
	case "bool":
		return "boolean"
	case "varchar":
		return "character varying"
	case "char":
		return "character"
	case "decimal":
		return "numeric"
	case "float", "float8":
		return "double precision"
	case "float4":
		return "real"
	case "timestamp":
		return "timestamp without time zone"
	case "timestamptz":
		return "timestamp with time zone"
	case "time":
		return "time without time zone"
	case "timetz":
		return "time with time zone"
	case "varbit":
		return "bit varying"
	}
	return ""
}

// sqlPlace is a place after ON in GRANT and REVOKE.
func sqlPlace(place Place, object *Object) string {
	inSchema := quote(place.Schema) + "." + quote(place.Name)
	switch place.Kind {
	case site.OnDatabase:
		return "DATABASE " + quote(place.Database)
	case site.OnSchema:
		return "SCHEMA " + quote(place.Schema)
	case site.OnSequences:
		return "SEQUENCE " + inSchema
	case site.OnFunctions:
		return "ROUTINE " + object.Signature
	}
	return "TABLE " + inSchema
}

// sqlDefaults is the beginning of a statement about default privileges.
func sqlDefaults(place Place) string {
	text := "ALTER DEFAULT PRIVILEGES FOR ROLE " + quote(place.DefaultFor)
	if place.Schema != "" {
		text += " IN SCHEMA " + quote(place.Schema)
	}
	return text + " "
}

func sqlPrivileges(h holding) string {
	if h.place.Column == "" {
		return strings.Join(h.privileges, ", ")
	}
	words := make([]string, 0, len(h.privileges))
	for _, privilege := range h.privileges {
		words = append(words, fmt.Sprintf("%s (%s)", privilege, quote(h.place.Column)))
	}
	return strings.Join(words, ", ")
}

func databaseOf(place Place) string {
	if place.Kind == site.OnDatabase {
		return ""
	}
	return place.Database
}

func grantSQL(h holding, object *Object) []Statement {
	if h.place.DefaultFor != "" {
		return sql(h.place.Database, "%sGRANT %s ON %s TO %s", sqlDefaults(h.place), sqlPrivileges(h), strings.ToUpper(plural(h.place.Kind)), quoteGrantee(h.role))
	}
	return sql(databaseOf(h.place), "GRANT %s ON %s TO %s", sqlPrivileges(h), sqlPlace(h.place, object), quoteGrantee(h.role))
}

// revokeSQL takes privileges back in the name of whoever granted them: the
// server revokes only what the revoking role gave.
func revokeSQL(h holding, object *Object, option string, grantors map[claim][]string) []Statement {
	if h.place.DefaultFor != "" {
		return sql(h.place.Database, "%sREVOKE %s%s ON %s FROM %s", sqlDefaults(h.place), option, sqlPrivileges(h), strings.ToUpper(plural(h.place.Kind)), quoteGrantee(h.role))
	}
	byGrantor := map[string][]string{}
	var order []string
	for _, privilege := range h.privileges {
		for _, grantor := range grantors[claim{h.place, h.role, privilege}] {
			if len(byGrantor[grantor]) == 0 {
				order = append(order, grantor)
			}
			byGrantor[grantor] = append(byGrantor[grantor], privilege)
		}
	}
	var statements []Statement
	database := databaseOf(h.place)
	for _, grantor := range order {
		part := holding{h.place, h.role, byGrantor[grantor]}
		// Those who got it on from this role lose it too.
		revoke := sql(database, "REVOKE %s%s ON %s FROM %s CASCADE", option, sqlPrivileges(part), sqlPlace(h.place, object), quoteGrantee(h.role))
		if grantor == object.Owner {
			statements = append(statements, revoke...)
			continue
		}
		statements = append(statements, sql(database, "SET LOCAL ROLE %s", quote(grantor))...)
		statements = append(statements, revoke...)
		statements = append(statements, sql(database, "RESET ROLE")...)
	}
	return statements
}
