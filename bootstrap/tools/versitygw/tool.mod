module github.com/nomad-site/site/bootstrap/tools/versitygw

go 1.26

require github.com/versity/versitygw v1.8.0
