#!/bin/bash
# make run: serves on 127.0.0.1:8080 with the data in $GRAFT_DATA or .cache/data. The first time it also fetches
# and imports a small model and prints an API key, since without these two there is nothing to do.
set -euo pipefail
cd "$(dirname "$0")/../.."

data=${GRAFT_DATA:-.cache/data}
listen=127.0.0.1:${PORT:-8080}
model=smollm2-135m

if [ ! -e "$data/first-run-done" ]; then
    mkdir -p "$data"
    if path=$(tests/demo/fetch_model.sh); then
        echo "Importing $path as $model"
        GRAFT_LOG_LEVEL=warn build/graft model import "$path" --name "$model" --data "$data" >/dev/null
    else
        echo "Going on without a model. When you have one:"
        echo "    build/graft model import PATH --name NAME --data $data"
    fi
    key=$(GRAFT_LOG_LEVEL=warn build/graft key create --org me --project first --data "$data")
    touch "$data/first-run-done"
    cat <<TEXT

Your API key, shown this once:

    $key

Any OpenAI client works with it:

    export OPENAI_BASE_URL=http://$listen/v1 OPENAI_API_KEY=$key
    curl \$OPENAI_BASE_URL/chat/completions -H "Authorization: Bearer \$OPENAI_API_KEY" \\
      -H 'Content-Type: application/json' \\
      -d '{"model": "$model", "messages": [{"role": "user", "content": "Hello"}]}'

More keys: build/graft key create --org ORG --project PROJECT --data $data

TEXT
fi
echo "Serving on http://$listen with the data in $data. Ctrl-C stops it."
exec build/graft serve --data "$data" --listen "$listen"
