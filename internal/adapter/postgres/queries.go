package postgres

import "strings"

// Objects below this identifier were made by initdb (FirstNormalObjectId).
const firstOwnObject = "16384"

// clusterQuery reads what belongs to no database. A configuration file's time
// has whole seconds only: one of the second in which the server loaded its
// configuration may be newer.
func clusterQuery() string {
	return `
SELECT json_build_object(
  'roles', (SELECT coalesce(json_agg(json_build_object(
      'name', rolname, 'system', oid < ` + firstOwnObject + ` OR starts_with(rolname::text, 'pg_'), 'login', rolcanlogin,
      'superuser', rolsuper, 'create_db', rolcreatedb, 'create_role', rolcreaterole, 'inherit', rolinherit,
      'replication', rolreplication, 'bypass_rls', rolbypassrls, 'connection_limit', rolconnlimit,
      'valid_until', CASE WHEN rolvaliduntil <> 'infinity' THEN rolvaliduntil::text END,
      'verifier', rolpassword, 'acts_as', acts_as) ORDER BY rolname), '[]')
    FROM pg_authid LEFT JOIN (
      SELECT setrole, json_object_agg(coalesce(datname, ''), substr(setting, length('role=') + 1)) AS acts_as
      FROM pg_db_role_setting LEFT JOIN pg_database AS d ON d.oid = setdatabase, unnest(setconfig) AS setting
      WHERE starts_with(setting, 'role=') GROUP BY setrole) AS s ON s.setrole = pg_authid.oid),
  'memberships', (SELECT coalesce(json_agg(json_build_object('role', role, 'member', member, 'admin', admin) ORDER BY role, member), '[]')
    FROM (SELECT pg_get_userbyid(roleid) AS role, pg_get_userbyid(member) AS member, bool_or(admin_option) AS admin
      FROM pg_auth_members GROUP BY roleid, member) AS m),
  'databases', (SELECT coalesce(json_agg(json_build_object(
      'name', datname, 'system', oid < ` + firstOwnObject + ` OR datistemplate OR datname = 'postgres',
      'owner', pg_get_userbyid(datdba), 'connection_limit', datconnlimit,
      'sessions', (SELECT count(*) FROM pg_stat_activity AS a WHERE a.datid = d.oid AND a.pid <> pg_backend_pid()),
      'acl', ` + aclOf("coalesce(datacl, acldefault('d', datdba))", "acldefault('d', datdba)") + `) ORDER BY datname), '[]') FROM pg_database AS d),
  'ident_stale', (pg_stat_file(current_setting('ident_file'))).modification >= date_trunc('second', pg_conf_load_time()),
  'hba_stale', (pg_stat_file(current_setting('hba_file'))).modification >= date_trunc('second', pg_conf_load_time())
)`
}

// objectsQuery reads what privileges are on inside of one database, and the
// default privileges. What extensions and initdb granted is marked as initial.
func objectsQuery() string {
	return `
WITH schemas AS (
  SELECT * FROM pg_namespace WHERE NOT starts_with(nspname::text, 'pg_') AND nspname <> 'information_schema'
), objects AS (
  SELECT 'schema' AS kind, nspname AS schema, '' AS name, '' AS column, '' AS signature, nspowner AS owner, '' AS default_for,
    coalesce(nspacl, acldefault('n', nspowner)) AS acl, acldefault('n', nspowner) AS initial,
    'pg_namespace'::regclass AS class, oid AS object, 0 AS part
  FROM schemas
  UNION ALL
  SELECT CASE WHEN relkind = 'S' THEN 'sequence' ELSE 'table' END, nspname, relname, '', '', relowner, '',
    coalesce(relacl, acldefault(CASE WHEN relkind = 'S' THEN 's'::"char" ELSE 'r'::"char" END, relowner)),
    acldefault(CASE WHEN relkind = 'S' THEN 's'::"char" ELSE 'r'::"char" END, relowner),
    'pg_class'::regclass, c.oid, 0
  FROM pg_class AS c JOIN schemas AS n ON n.oid = relnamespace WHERE relkind IN ('r', 'v', 'm', 'f', 'p', 'S')
  UNION ALL
  SELECT 'column', nspname, relname, attname, '', relowner, '', attacl, acldefault('c', relowner), 'pg_class'::regclass, c.oid, attnum
  FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = attrelid JOIN schemas AS n ON n.oid = relnamespace
  WHERE attacl IS NOT NULL AND NOT attisdropped AND relkind IN ('r', 'v', 'm', 'f', 'p')
  UNION ALL
  SELECT 'function', nspname, proname || '(' || oidvectortypes(proargtypes) || ')', '', p.oid::regprocedure::text, proowner, '',
    coalesce(proacl, acldefault('f', proowner)), acldefault('f', proowner), 'pg_proc'::regclass, p.oid, 0
  FROM pg_proc AS p JOIN schemas AS n ON n.oid = pronamespace
  UNION ALL
  SELECT CASE defaclobjtype WHEN 'r' THEN 'table' WHEN 'S' THEN 'sequence' WHEN 'f' THEN 'function' WHEN 'T' THEN 'type' ELSE 'schemas' END,
    coalesce(nspname, ''), '', '', '', defaclrole, pg_get_userbyid(defaclrole), defaclacl,
    CASE WHEN defaclnamespace = 0 THEN acldefault(CASE WHEN defaclobjtype = 'S' THEN 's'::"char" ELSE defaclobjtype END, defaclrole) END,
    'pg_default_acl'::regclass, d.oid, 0
  FROM pg_default_acl AS d LEFT JOIN pg_namespace AS n ON n.oid = defaclnamespace
)
SELECT coalesce(json_agg(json_build_object(
  'kind', kind, 'schema', schema, 'name', name, 'column', o.column, 'signature', signature,
  'owner', pg_get_userbyid(owner), 'default_for', default_for,
  'acl', ` + aclOf("acl", "initial", "(SELECT initprivs FROM pg_init_privs AS i WHERE i.objoid = object AND i.classoid = class AND i.objsubid = part)") + `
)), '[]') FROM objects AS o`
}

// aclOf reads an access control list as JSON; entries of the initial ones are
// marked. Those may be null, but not empty arrays: the server refuses these.
func aclOf(list string, initial ...string) string {
	marks := make([]string, 0, len(initial))
	for _, one := range initial {
		marks = append(marks, "EXISTS (SELECT FROM aclexplode("+one+") AS b WHERE b.grantee = e.grantee AND b.privilege_type = e.privilege_type)")
	}
	return `(SELECT coalesce(json_agg(json_build_object(
    'role', CASE WHEN e.grantee = 0 THEN 'public' ELSE pg_get_userbyid(e.grantee) END, 'grantor', pg_get_userbyid(e.grantor),
    'privilege', e.privilege_type, 'grantable', e.is_grantable,
    'initial', ` + strings.Join(marks, " OR ") + `)), '[]')
    FROM aclexplode(` + list + `) AS e)`
}

// configurationErrors names what the server can't read in its files: it would
// keep what it has loaded and say so only in its log.
const configurationErrors = `
SELECT coalesce(string_agg(problem, '; '), '') FROM (
  SELECT format('pg_hba.conf line %s: %s', line_number, error) AS problem FROM pg_hba_file_rules WHERE error IS NOT NULL
  UNION ALL
  SELECT format('pg_ident.conf line %s: %s', line_number, error) FROM pg_ident_file_mappings WHERE error IS NOT NULL
) AS problems`

const configurationStale = `
SELECT greatest((pg_stat_file(current_setting('ident_file'))).modification, (pg_stat_file(current_setting('hba_file'))).modification)
  >= date_trunc('second', pg_conf_load_time())`
