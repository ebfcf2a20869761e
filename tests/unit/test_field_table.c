/* field_table.h, api_check.h, api_job_request.h: what becomes of each field, and in which words. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "server/api_check.h"
#include "server/api_files.h"
#include "server/api_job_request.h"
#include "server/field_table.h"

/* ------------------------------------------------------------------ the tables */

static void every_entry_has_what_it_needs(void **state)
{
    for (size_t t = 0; t < field_table_count; t++) {
        const struct field_table *table = field_tables[t];
        for (size_t i = 0; i < table->count; i++) {
            const struct field *field = &table->fields[i];
            assert_ptr_equal(field_table_find(table, field->path), field); /* no doubles */
            if (field->use != FIELD_HONOURED)
                assert_true(field->note && field->note[0]);
            if (field->neutral) {
                assert_int_equal(field->use, FIELD_REFUSED);
                json_t *neutral = json_loads(field->neutral, JSON_DECODE_ANY, NULL);
                assert_non_null(neutral);
                json_decref(neutral);
            }
            char parent[128];
            snprintf(parent, sizeof(parent), "%s", field->path);
            char *dot = strrchr(parent, '.');
            if (dot) {
                *dot = '\0';
                assert_non_null(field_table_find(table, parent));
            }
        }
    }
}

/* To print the page anew: GRAFT_WRITE_FIELDS=api-spec/fields.md build/tests/unit/test_field_table
 */
static void the_page_is_printed_from_the_tables(void **state)
{
    struct strbuf page;
    char *text = NULL;
    size_t len = 0;
    struct err err = {0};
    strbuf_init(&page, 1 << 20);
    field_table_render(&page);
    assert_false(strbuf_failed(&page));
    const char *write_to = getenv("GRAFT_WRITE_FIELDS");
    if (write_to)
        assert_int_equal(file_write_durable(write_to, page.data, page.len, &err), 0);
    assert_int_equal(file_read_all("api-spec/fields.md", 1 << 20, &text, &len, &err), 0);
    assert_string_equal(text, page.data);
    free(text);
    strbuf_release(&page);
}

static const json_t *deref(const json_t *root, const json_t *schema)
{
    const char *ref;
    while ((ref = json_string_value(json_object_get(schema, "$ref")))) {
        const json_t *schemas = json_object_get(json_object_get(root, "components"), "schemas");
        schema = json_object_get(schemas, strrchr(ref, '/') + 1);
        assert_non_null(schema);
    }
    return schema;
}

/* Collects the properties of a schema and of what it is made of. */
static void collect(const json_t *root, const json_t *schema, json_t *out)
{
    static const char *const parts[] = {"allOf", "anyOf", "oneOf"};
    schema = deref(root, schema);
    json_object_update(out, json_object_get(schema, "properties"));
    for (size_t i = 0; i < 3; i++) {
        size_t j;
        json_t *part;
        json_array_foreach(json_object_get(schema, parts[i]), j, part) collect(root, part, out);
    }
}

static bool has_children(const struct field_table *table, const char *path)
{
    for (size_t i = 0; i < table->count; i++)
        if (strncmp(table->fields[i].path, path, strlen(path)) == 0 &&
            table->fields[i].path[strlen(path)] == '.')
            return true;
    return false;
}

/* Every property of the contract has an entry; *seen counts them. */
static void compare(const json_t *root, const json_t *schema, const struct field_table *table,
                    const char *prefix, size_t *seen)
{
    json_t *properties = json_object();
    const char *name;
    json_t *property;
    collect(root, schema, properties);
    json_object_foreach(properties, name, property)
    {
        char path[160];
        snprintf(path, sizeof(path), "%s%s%s", prefix, prefix[0] ? "." : "", name);
        if (!field_table_find(table, path))
            print_error("%s: the contract has %s, the table has not\n", table->resource, path);
        assert_non_null(field_table_find(table, path));
        ++*seen;
        if (has_children(table, path))
            compare(root, property, table, path, seen);
    }
    json_decref(properties);
}

static void the_tables_have_every_field_of_the_contract(void **state)
{
    const char *dir = getenv("GRAFT_CONTRACT_DIR");
    if (!dir) {
        print_message("GRAFT_CONTRACT_DIR is not set: the contract's schema is not at hand\n");
        skip();
    }
    char path[1024], *text = NULL;
    size_t len;
    struct err err = {0};
    snprintf(path, sizeof(path), "%s/openai-subset.normalized.json", dir);
    if (file_read_all(path, 16 << 20, &text, &len, &err) < 0)
        fail_msg("%s", err.message);
    json_t *root = json_loadb(text, len, JSON_DECODE_INT_AS_REAL, NULL); /* it has 2^63 */
    free(text);
    assert_non_null(root);
    for (size_t t = 0; t < field_table_count; t++) {
        const struct field_table *table = field_tables[t];
        const json_t *schemas = json_object_get(json_object_get(root, "components"), "schemas");
        const json_t *schema = json_object_get(schemas, table->resource);
        size_t seen = 0, ours = 0;
        if (strstr(table->route, " /v1/graft/")) /* ours altogether */
            continue;
        assert_non_null(schema);
        compare(root, schema, table, "", &seen);
        for (size_t i = 0; i < table->count; i++)
            ours += strncmp(table->fields[i].path, "graft", 5) == 0;
        assert_int_equal(seen + ours, table->count); /* and nothing else but ours */
    }
    json_decref(root);
}

static void unknown_and_refused_fields_are_named(void **state)
{
    static const struct {
        const char *json, *code, *param;
    } cases[] = {
        {"{\"model\":\"m\",\"messages\":[],\"stream_options\":{\"include_usage\":true}}", NULL,
         NULL},
        {"{\"x\":1}", "unknown_parameter", "x"},
        {"{\"stream_options\":{\"x\":1}}", "unknown_parameter", "stream_options.x"},
        {"{\"stream_options.include_usage\":true}", "unknown_parameter",
         "stream_options.include_usage"},
        {"{\"tools\":[{}]}", "unsupported_parameter", "tools"},
        {"{\"tools\":[]}", NULL, NULL},
        {"{\"tools\":null}", NULL, NULL},
        {"{\"n\":1}", NULL, NULL},
        {"{\"n\":1.0}", NULL, NULL},
        {"{\"n\":2}", "unsupported_parameter", "n"},
        {"{\"frequency_penalty\":0.0}", NULL, NULL},
        {"{\"frequency_penalty\":0.1}", "unsupported_parameter", "frequency_penalty"},
        {"{\"response_format\":{\"type\":\"text\"}}", NULL, NULL},
        {"{\"response_format\":{\"type\":\"json_object\"}}", "unsupported_parameter",
         "response_format"},
        {"{\"store\":true}", "unsupported_parameter", "store"},
        {"{\"metadata\":{\"anything\":\"goes\"}}", NULL, NULL},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct err err = {0};
        json_t *json = json_loads(cases[i].json, 0, NULL);
        int rc = field_table_check(&field_table_chat, json, &err);
        json_decref(json);
        assert_int_equal(rc, cases[i].code ? -1 : 0);
        assert_string_equal(err.code, cases[i].code ? cases[i].code : "");
        assert_string_equal(err.param, cases[i].param ? cases[i].param : "");
    }
    char *name = calloc(1, 5001);
    memset(name, 'n', 5000);
    json_t *json = json_object();
    json_object_set_new(json, name, json_true());
    struct err err = {0};
    assert_int_equal(field_table_check(&field_table_chat, json, &err), -1);
    assert_string_equal(err.code, "unknown_parameter");
    json_decref(json);
    free(name);
}

/* ------------------------------------------------------------------ CreateFineTuningJobRequest */

static int parse(const char *json, struct api_job_request *request, json_t **body, struct err *err)
{
    *body = json_text_load(json, strlen(json), 0, err);
    return *body ? api_job_request_parse(request, *body, err) : -1;
}

#define MIN "\"model\":\"m\",\"training_file\":\"f\""
#define SUPERVISED(h) \
    "{" MIN ",\"method\":{\"type\":\"supervised\",\"supervised\":{\"hyperparameters\":{" h "}}}}"

static void a_full_job_request_is_read(void **state)
{
    struct api_job_request request;
    struct err err = {0};
    json_t *body;
    /* what openai-node's test with all parameters sends, without integrations */
    assert_int_equal(
        parse(
            "{\"model\":\"gpt-4o-mini\",\"training_file\":\"file-abc123\",\"hyperparameters\":{"
            "\"batch_size\":\"auto\",\"learning_rate_multiplier\":\"auto\",\"n_epochs\":\"auto\"},"
            "\"integrations\":null,\"metadata\":{\"foo\":\"string\"},\"method\":{\"type\":"
            "\"supervised\",\"dpo\":{\"hyperparameters\":{\"beta\":\"auto\"}},\"reinforcement\":{"
            "\"grader\":{\"input\":\"input\",\"type\":\"string_check\"}},\"supervised\":{"
            "\"hyperparameters\":{\"batch_size\":4,\"learning_rate_multiplier\":1.5,"
            "\"n_epochs\":3.0}}},\"seed\":42,\"suffix\":\"x\",\"validation_file\":\"file-v\","
            "\"graft\":{\"train_embeddings\":true,\"schedule\":\"cosine\"}}",
            &request, &body, &err),
        0);
    assert_string_equal(request.job.model, "gpt-4o-mini");
    assert_string_equal(request.job.validation_file, "file-v");
    assert_int_equal(request.job.chosen.n_epochs, 3);
    assert_int_equal(request.job.chosen.batch_size, 4);
    assert_true(fabs(request.job.chosen.learning_rate_multiplier - 1.5) < 1e-12);
    assert_int_equal(request.job.seed, 42);
    assert_string_equal(request.job.method_type, "supervised");
    assert_string_equal(request.job.metadata, "{\"foo\":\"string\"}");
    assert_true(request.job.train_embeddings);
    assert_string_equal(request.job.schedule, "cosine");
    api_job_request_release(&request);
    json_decref(body);
    assert_int_equal(parse("{" MIN
                           ",\"suffix\":null,\"seed\":null,\"method\":null,\"metadata\":null,"
                           "\"validation_file\":null,\"graft\":null,\"integrations\":[],"
                           "\"hyperparameters\":{\"n_epochs\":7}}",
                           &request, &body, &err),
                     0);
    assert_int_equal(request.job.seed, -1);
    assert_int_equal(request.job.chosen.n_epochs, 7);
    assert_int_equal(request.job.chosen.batch_size, 0);
    assert_null(request.job.suffix);
    api_job_request_release(&request);
    json_decref(body);
}

static void wrong_job_requests_are_refused_by_field(void **state)
{
    static const struct {
        const char *json, *code, *param;
    } cases[] = {
        {"{}", "missing_required_parameter", "model"},
        {"{\"model\":\"m\"}", "missing_required_parameter", "training_file"},
        {"{\"model\":null,\"training_file\":\"f\"}", "missing_required_parameter", "model"},
        {"{\"model\":1,\"training_file\":\"f\"}", "invalid_type", "model"},
        {"{\"model\":\"\",\"training_file\":\"f\"}", "string_below_min_length", "model"},
        {"{" MIN ",\"tenant_id\":\"x\"}", "unknown_parameter", "tenant_id"},
        {"{" MIN ",\"status\":\"succeeded\"}", "unknown_parameter", "status"},
        {"{" MIN ",\"suffix\":\"\"}", "string_below_min_length", "suffix"},
        {"{" MIN ",\"suffix\":\"a:b\"}", "invalid_value", "suffix"},
        {"{" MIN ",\"suffix\":\"a/b\"}", "invalid_value", "suffix"},
        {"{" MIN ",\"suffix\":"
         "\"0123456789012345678901234567890123456789012345678901234567890123x\"}",
         "string_above_max_length", "suffix"},
        {"{" MIN ",\"seed\":-1}", "integer_below_min_value", "seed"},
        {"{" MIN ",\"seed\":2147483648}", "integer_above_max_value", "seed"},
        {"{" MIN ",\"seed\":1.5}", "invalid_type", "seed"},
        {"{" MIN ",\"seed\":\"1\"}", "invalid_type", "seed"},
        {"{" MIN ",\"seed\":true}", "invalid_type", "seed"},
        {"{" MIN ",\"metadata\":{\"a\":1}}", "invalid_type", "metadata"},
        {"{" MIN ",\"metadata\":[]}", "invalid_type", "metadata"},
        {"{" MIN ",\"metadata\":{\"\":\"x\"}}", "string_below_min_length", "metadata"},
        {"{" MIN ",\"metadata\":{\"1\":\"\",\"2\":\"\",\"3\":\"\",\"4\":\"\",\"5\":\"\",\"6\":\"\","
         "\"7\":\"\",\"8\":\"\",\"9\":\"\",\"10\":\"\",\"11\":\"\",\"12\":\"\",\"13\":\"\","
         "\"14\":\"\",\"15\":\"\",\"16\":\"\",\"17\":\"\"}}",
         "object_above_max_properties", "metadata"},
        {"{" MIN ",\"integrations\":[{\"type\":\"wandb\",\"wandb\":{\"project\":\"p\"}}]}",
         "unsupported_parameter", "integrations"},
        {"{" MIN ",\"method\":{}}", "missing_required_parameter", "method.type"},
        {"{" MIN ",\"method\":{\"type\":\"dpo\"}}", "unsupported_value", "method.type"},
        {"{" MIN ",\"method\":{\"type\":\"reinforcement\"}}", "unsupported_value", "method.type"},
        {"{" MIN ",\"method\":{\"type\":\"magic\"}}", "invalid_value", "method.type"},
        {"{" MIN ",\"method\":{\"type\":\"supervised\",\"x\":1}}", "unknown_parameter", "method.x"},
        {"{" MIN ",\"method\":\"supervised\"}", "invalid_type", "method"},
        {"{" MIN ",\"method\":{\"type\":\"supervised\",\"supervised\":[]}}", "invalid_type",
         "method.supervised"},
        {SUPERVISED("\"n_epochs\":0"), "integer_below_min_value",
         "method.supervised.hyperparameters.n_epochs"},
        {SUPERVISED("\"n_epochs\":51"), "integer_above_max_value",
         "method.supervised.hyperparameters.n_epochs"},
        {SUPERVISED("\"n_epochs\":\"many\""), "invalid_type",
         "method.supervised.hyperparameters.n_epochs"},
        {SUPERVISED("\"batch_size\":257"), "integer_above_max_value",
         "method.supervised.hyperparameters.batch_size"},
        {SUPERVISED("\"learning_rate_multiplier\":0"), "decimal_below_min_value",
         "method.supervised.hyperparameters.learning_rate_multiplier"},
        {SUPERVISED("\"learning_rate_multiplier\":-1"), "decimal_below_min_value",
         "method.supervised.hyperparameters.learning_rate_multiplier"},
        {SUPERVISED("\"beta\":1"), "unknown_parameter", "method.supervised.hyperparameters.beta"},
        {"{" MIN ",\"hyperparameters\":{\"batch_size\":0}}", "integer_below_min_value",
         "hyperparameters.batch_size"},
        {"{" MIN ",\"graft\":{\"train_embeddings\":1}}", "invalid_type", "graft.train_embeddings"},
        {"{" MIN ",\"graft\":{\"schedule\":\"step\"}}", "invalid_value", "graft.schedule"},
        {"{" MIN ",\"graft\":{\"owner\":1}}", "unknown_parameter", "graft.owner"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct api_job_request request;
        struct err err = {0};
        json_t *body;
        int rc = parse(cases[i].json, &request, &body, &err);
        if (rc != -1 || strcmp(err.code, cases[i].code) != 0)
            print_error("%s: %s\n", cases[i].json, err.message);
        assert_int_equal(rc, -1);
        assert_int_equal(err.kind, ERR_INVALID);
        assert_string_equal(err.code, cases[i].code);
        assert_string_equal(err.param, cases[i].param);
        api_job_request_release(&request);
        json_decref(body);
    }
}

/* ------------------------------------------------------------------ lists */

static int page_of(const char *query, struct api_page *page, struct err *err)
{
    static const char *const other[] = {"metadata", NULL};
    const struct api_page_rules rules = {
        .default_limit = 20, .max_limit = 100, .order = true, .other = other};
    static char text[256];
    struct http_request request = {0};
    snprintf(text, sizeof(text), "%s", query);
    for (char *p = text; *p;) {
        char *next = strchr(p, '&');
        if (next)
            *next++ = '\0';
        char *equals = strchr(p, '=');
        *equals = '\0';
        request.query[request.query_count++] = (struct http_pair){p, equals + 1};
        p = next ? next : p + strlen(p);
        if (!next)
            break;
    }
    return api_page_parse(&request, &rules, page, err);
}

static void pages_are_read_and_bounded(void **state)
{
    struct api_page page;
    struct err err = {0};
    assert_int_equal(page_of("", &page, &err), 0);
    assert_int_equal(page.limit, 20);
    assert_null(page.after);
    assert_false(page.ascending);
    assert_int_equal(
        page_of("limit=100&after=x&order=asc&metadata[a]=b&metadata=null", &page, &err), 0);
    assert_int_equal(page.limit, 100);
    assert_string_equal(page.after, "x");
    assert_true(page.ascending);
    static const char *const bad[] = {
        "limit=0",  "limit=101",   "limit=-1",     "limit=x",
        "limit= 1", "limit=",      "limit=1x",     "order=down",
        "offset=1", "metadata[=1", "metadata[]=1", "limit=99999999999999999999"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        err_clear(&err);
        if (page_of(bad[i], &page, &err) == 0)
            print_error("accepted: %s\n", bad[i]);
        assert_int_equal(err.kind, ERR_INVALID);
        assert_true(err.code[0] && err.param[0]);
    }
}

static void files_must_look_like_jsonl(void **state)
{
    static const struct {
        const char *head;
        bool whole;
        int line; /* 0: fine */
    } cases[] = {
        {"{}\n", true, 0},
        {"{}", true, 0},
        {"{\"a\":1}\r\n{}\r\n", true, 0},
        {"{}\n\n", true, 0},
        {"\xef\xbb\xbf{}", true, 0},
        {"{}\n{\"a\":", false, 0},
        {"{\"a\":", false, 0},
        {"", true, 1},
        {"\n \n", true, 1},
        {"hello", true, 1},
        {"[]\n", true, 1},
        {"{}\n[]\n", true, 2},
        {"{}\n{\"a\":\n}\n", true, 2},
        {"{\"a\":", true, 1},
        {"{}\n\n{\n", true, 3},
        {"{} {}\n", true, 1},
        {"{}\nx", false, 2},
        {"{\"a\":\"\xff\"}\n", true, 1},
        {"1\n", true, 1},
        {"PK\x03\x04", false, 1},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct err err = {0};
        char *exact = strdup(cases[i].head);
        int rc = api_files_check_jsonl(exact, strlen(exact), cases[i].whole, &err);
        free(exact);
        assert_int_equal(rc, cases[i].line ? -1 : 0);
        if (cases[i].line) {
            char says[32];
            snprintf(says, sizeof(says), "Line %d is", cases[i].line);
            assert_non_null(strstr(err.message, says));
            assert_non_null(strstr(err.message, "Expected file to have JSONL format, where every "
                                                "line is a valid JSON dictionary"));
            assert_string_equal(err.param, "file");
        }
    }
}

int main(void)
{
    json_text_setup();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_entry_has_what_it_needs),
        cmocka_unit_test(the_page_is_printed_from_the_tables),
        cmocka_unit_test(the_tables_have_every_field_of_the_contract),
        cmocka_unit_test(unknown_and_refused_fields_are_named),
        cmocka_unit_test(a_full_job_request_is_read),
        cmocka_unit_test(wrong_job_requests_are_refused_by_field),
        cmocka_unit_test(pages_are_read_and_bounded),
        cmocka_unit_test(files_must_look_like_jsonl),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
