#!/bin/sh
# Prints a C file that holds the migrations named on the command line, in that order.
set -eu

echo '#include "storage/migrations_data.h"'
i=0
for file in "$@"; do
    echo "static const char sql_${i}[] = {"
    od -An -v -tu1 "$file" | sed -e 's/[0-9][0-9]*/&,/g'
    echo '0};'
    i=$((i + 1))
done
echo 'const struct migration_data migrations_data[] = {'
i=0
for file in "$@"; do
    name=$(basename "$file" .sql)
    number=$(echo "$name" | sed -n 's/^0*\([1-9][0-9]*\)_.*/\1/p')
    if [ -z "$number" ]; then
        echo "$file: a migration is called NNNN_name.sql" >&2
        exit 1
    fi
    echo "{ $number, \"$name\", sql_$i, sizeof sql_$i - 1 },"
    i=$((i + 1))
done
echo '};'
echo "const int migrations_data_count = $i;"
