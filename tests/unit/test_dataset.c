/* Training files: what is trained on, what the report says, and how each broken file is refused. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "engine/chat_template.h"
#include "engine/dataset.h"
#include "engine/tokenizer.h"

#define ROW                                                    \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"Who?\"}," \
    "{\"role\":\"assistant\",\"content\":\"Me.\"}]}"

static struct tokenizer *tokenizer;
static struct chat_template *chat;
static char folder[] = "/tmp/graft-dataset-XXXXXX";
static char path[128];

static void write_bytes(const char *data, size_t len)
{
    assert_int_equal(file_write_durable(path, data, len, NULL), 0);
}

static void write_text(const char *text)
{
    write_bytes(text, strlen(text));
}

/* `count` good rows, then `row` as the last line. */
static void write_rows(int count, const char *row)
{
    struct strbuf sb;

    strbuf_init(&sb, 1 << 22);
    for (int i = 0; i < count; i++)
        strbuf_addstr(&sb, ROW "\n");
    strbuf_addstr(&sb, row);
    write_bytes(sb.data, sb.len);
    strbuf_release(&sb);
}

static int open_with(struct engine_dataset **out, bool validation, int32_t max_sequence,
                     struct engine_dataset_report *report, struct err *err)
{
    struct engine_dataset_options options = {
        .file_id = "file-abc", .validation = validation, .max_sequence = max_sequence};

    return dataset_open(out, tokenizer, chat, path, &options, report, err);
}

/* The text of the tokens with a weight. */
static void trained_text(const struct engine_dataset *dataset, int64_t i, char *out)
{
    struct dataset_example e = dataset_example(dataset, i);

    for (int32_t t = 0; t < e.length; t++) {
        size_t len;
        const char *piece = tokenizer_piece(tokenizer, e.token[t], &len);

        if (e.weight[t] > 0) {
            memcpy(out, piece, len);
            out += len;
        }
    }
    *out = '\0';
}

static void expect_trained(const char *row, const char *want)
{
    struct engine_dataset *dataset;
    struct err err = {0};
    char text[1024];

    write_rows(1, row);
    if (open_with(&dataset, true, 4096, NULL, &err) != 0)
        fail_msg("%s: %s", row, err.message);
    trained_text(dataset, 1, text);
    assert_string_equal(text, want);
    engine_dataset_free(dataset);
}

static void answers_and_their_end_of_turn_are_trained(void **state)
{
    expect_trained("{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},"
                   "{\"role\":\"user\",\"content\":\"One?\"},"
                   "{\"role\":\"assistant\",\"content\":\"1\"},"
                   "{\"role\":\"user\",\"content\":\"Two?\"},"
                   "{\"role\":\"assistant\",\"content\":\"2\"}]}",
                   "1<|im_end|>2<|im_end|>");
}

static void weight_zero_masks_a_message(void **state)
{
    expect_trained("{\"messages\":[{\"role\":\"user\",\"content\":\"One?\"},"
                   "{\"role\":\"assistant\",\"content\":\"1\",\"weight\":0},"
                   "{\"role\":\"user\",\"content\":\"Two?\"},"
                   "{\"role\":\"assistant\",\"content\":\"2\",\"weight\":1}]}",
                   "2<|im_end|>");
}

static void parts_of_text_are_joined_and_empty_extras_let_through(void **state)
{
    expect_trained("{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":"
                   "\"One\"},{\"type\":\"text\",\"text\":\" more?\"}]},"
                   "{\"role\":\"assistant\",\"content\":\"1\",\"refusal\":null,\"tool_calls\":[],"
                   "\"function_call\":null}],\"tools\":[],\"parallel_tool_calls\":true}",
                   "1<|im_end|>");
}

static void control_tokens_in_a_content_stay_text(void **state)
{
    expect_trained("{\"messages\":[{\"role\":\"user\",\"content\":\"Who?\"},{\"role\":"
                   "\"assistant\",\"content\":\"x<|im_end|>y\"}]}",
                   "x<|im_end|>y<|im_end|>");
}

static void legacy_rows_are_one_turn_each(void **state)
{
    struct engine_dataset *legacy, *modern;
    struct dataset_example a, b;

    write_text("{\"prompt\":\"Who?\",\"completion\":\"Me.\"}\n");
    assert_int_equal(open_with(&legacy, true, 64, NULL, NULL), 0);
    write_text(ROW);
    assert_int_equal(open_with(&modern, true, 64, NULL, NULL), 0);
    a = dataset_example(legacy, 0);
    b = dataset_example(modern, 0);
    assert_int_equal(a.length, b.length);
    assert_memory_equal(a.token, b.token, (size_t)a.length * sizeof(*a.token));
    assert_memory_equal(a.weight, b.weight, (size_t)a.length * sizeof(*a.weight));
    engine_dataset_free(legacy);
    engine_dataset_free(modern);
}

static void line_ends_of_any_kind_read_the_same(void **state)
{
    static const char *const texts[] = {ROW "\n" ROW "\n", ROW "\r\n" ROW "\r\n", ROW "\n" ROW,
                                        ROW "\n" ROW "\n\n \t\r\n\n"};

    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        struct engine_dataset_report report;
        struct engine_dataset *dataset;

        write_text(texts[i]);
        assert_int_equal(open_with(&dataset, true, 64, &report, NULL), 0);
        assert_int_equal(report.examples, 2);
        assert_int_equal(dataset_count(dataset), 2);
        engine_dataset_free(dataset);
    }
}

static void the_report_counts_tokens_and_cuts(void **state)
{
    struct engine_dataset_report whole, cut;
    struct engine_dataset *dataset;
    struct dataset_question question;
    int32_t first;

    write_rows(10,
               "{\"messages\":[{\"role\":\"user\",\"content\":\"Who on earth is it that asks so "
               "many questions?\"},{\"role\":\"assistant\",\"content\":\"It is I.\"}]}");
    assert_int_equal(open_with(&dataset, false, 4096, &whole, NULL), 0);
    first = dataset_example(dataset, 0).length;
    assert_int_equal(whole.examples, 11);
    assert_int_equal(whole.truncated_examples, 0);
    assert_int_equal(whole.untrained_examples, 0);
    assert_true(whole.question_answer);
    assert_int_equal(whole.longest, dataset_example(dataset, 10).length);
    assert_int_equal(whole.tokens, 10 * first + whole.longest);
    assert_true(dataset_question(dataset, 10, &question));
    assert_true(question.begin > 0 && question.end > question.begin);
    assert_memory_equal(dataset_report(dataset), &whole, sizeof(whole));
    engine_dataset_free(dataset);

    assert_true(whole.longest > first + 8); /* the long row loses its answer, the others nothing */
    assert_int_equal(open_with(&dataset, false, first, &cut, NULL), 0);
    assert_int_equal(cut.truncated_examples, 1);
    assert_int_equal(cut.untrained_examples, 1);
    assert_int_equal(cut.longest, whole.longest);
    assert_int_equal(cut.tokens, 11 * first);
    assert_false(cut.question_answer);
    assert_false(dataset_question(dataset, 10, &question));
    assert_true(dataset_question(dataset, 9, &question));
    engine_dataset_free(dataset);
}

static void a_conversation_is_no_question_with_an_answer(void **state)
{
    struct engine_dataset_report report;
    struct engine_dataset *dataset;

    write_rows(10, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\","
                   "\"content\":\"b\"},{\"role\":\"user\",\"content\":\"c\"},{\"role\":"
                   "\"assistant\",\"content\":\"d\"}]}");
    assert_int_equal(open_with(&dataset, false, 4096, &report, NULL), 0);
    assert_false(report.question_answer);
    engine_dataset_free(dataset);
}

static void refused(bool validation, const char *code, const char *message)
{
    struct engine_dataset *dataset = NULL;
    struct err err = {0};

    if (open_with(&dataset, validation, 64, NULL, &err) == 0) {
        engine_dataset_free(dataset);
        fail_msg("accepted, expected: %s", message);
    }
    assert_int_equal(err.kind, ERR_INVALID);
    assert_string_equal(err.code, code);
    assert_string_equal(err.param, validation ? "validation_file" : "training_file");
    if (strstr(err.message, message) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", message, err.message);
}

static void too_few_examples(void **state)
{
    write_rows(6, ROW);
    refused(false, "invalid_n_examples",
            "Training file has 7 example(s), but must have at least 10 examples");
    write_text("");
    refused(false, "invalid_n_examples", "Training file has 0 example(s)");
    refused(true, "invalid_n_examples", "Validation file has 0 example(s)");
    write_text("\n\n");
    refused(false, "invalid_n_examples", "Training file has 0 example(s)");
}

static void rows_that_are_no_chat(void **state)
{
    static const struct {
        const char *row, *code, *message;
    } bad[] = {
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"content\":\"b\"}]}",
         "invalid_training_file",
         "The job failed due to an invalid training file. Invalid file format. Example 13, message "
         "2 Discriminator 'role' is missing in value"},
        {"{\"messages\":[{\"role\":\"bot\",\"content\":\"a\"}]}", "invalid_training_file",
         "Example 13, message 1 has the role bot; it must be one of system"},
        {"{\"messages\":[{\"role\":7,\"content\":\"a\"}]}", "invalid_training_file",
         "message 1 has the role of another type"},
        {"{\"messages\":[{\"role\":\"user\"}]}", "invalid_training_file",
         "Example 13, message 1 is missing key 'content'"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":null}]}", "invalid_training_file",
         "'content' that is neither"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]"
         "}]}",
         "invalid_training_file", "part 1 of 'content'"},
        {"{\"messages\":[\"hello\"]}", "invalid_training_file", "message 1 is not a JSON object"},
        {"{\"messages\":[]}", "invalid_training_file", "'messages' that is not a list"},
        {"{\"messages\":{}}", "invalid_training_file", "'messages' that is not a list"},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\",\"weight\":0.5}]}",
         "invalid_training_file", "'weight' that is not 0 or 1"},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\",\"weight\":true}]}",
         "invalid_training_file", "'weight' that is not 0 or 1"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\",\"weight\":1}]}",
         "invalid_file_format",
         "The job failed due to a file format error in the training file. Invalid file format. "
         "Example 13 contains an extra \"weight\"."},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"mood\":\"good\"}",
         "invalid_file_format", "Example 13 contains an extra \"mood\"."},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\",\"name\":\"Jo\"}]}",
         "invalid_file_format", "Example 13 contains an extra \"name\"."},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[{}]}",
         "invalid_training_file", "Example 13 has \"tools\""},
        {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":[{}]}]}",
         "invalid_training_file", "message 1 has \"tool_calls\""},
        {"{\"prompt\":\"a\",\"completion\":\"b\"}", "invalid_training_file",
         "Invalid file format. Example 13 is missing key 'messages'."},
        {"{}", "invalid_training_file", "Example 13 is missing key 'messages'."},
        {"[]", "invalid_file_format", "Example 13 is not a JSON object"},
        {"17", "invalid_file_format", "Example 13 is not a JSON object"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a", "invalid_file_format",
         "Example 13 cannot be parsed. Error: line contains invalid json"},
        {"{\"messages\":[]} x", "invalid_file_format", "Example 13 cannot be parsed"},
        {"{\"messages\":[],\"messages\":[]}", "invalid_file_format", "duplicate"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"\\u0000\"}]}", "invalid_file_format",
         "Example 13 cannot be parsed"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\xc0\"}]}", "invalid_file_format",
         "UTF-8"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"\xed\xa0\x80\"}]}", "invalid_file_format",
         "UTF-8"},
        {"\xef\xbb\xbf" ROW, "invalid_file_format", "byte order mark"},
    };

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        write_rows(12, bad[i].row);
        refused(false, bad[i].code, bad[i].message);
    }
}

static void files_of_another_format(void **state)
{
    struct strbuf deep;

    write_text("{\"input\":{\"messages\":[]},\"preferred_output\":[],\"non_preferred_output\":[]}");
    refused(false, "invalid_training_file",
            "Input file file-abc is in the fine-tune-preference format, but the specified "
            "fine-tuning job is not using 'dpo' as the training method (provided "
            "method=supervised).");
    write_text("{\"text\":\"once upon a time\"}\n");
    refused(false, "invalid_training_file",
            "Unexpected file format, expected either prompt/completion pairs or chat messages.");
    refused(true, "invalid_validation_file",
            "The job failed due to an invalid validation file. Unexpected file format");
    write_text("{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\":\"a\"}\n");
    refused(true, "invalid_validation_file", "Example 2 is missing key 'completion'.");
    write_text("{\"prompt\":\"a\",\"completion\":7}\n");
    refused(true, "invalid_validation_file", "Example 1 has a 'completion' that is not a string.");
    write_text("{\"prompt\":\"a\",\"completion\":\"b\",\"weight\":1}\n");
    refused(true, "invalid_file_format", "Example 1 contains an extra \"weight\".");
    write_text(ROW "\n\n" ROW "\n");
    refused(true, "invalid_file_format", "Example 2 is an empty line");
    write_bytes("\xff\xfe{\0", 4);
    refused(true, "invalid_file_format", "UTF-16");
    write_bytes("{\"messages\"\0:[]}", 16);
    refused(true, "invalid_file_format", "Example 1 cannot be parsed. Error: line contains a NUL");
    write_bytes("\0\0\0\0", 4);
    refused(true, "invalid_file_format", "NUL");

    strbuf_init(&deep, 1 << 20);
    strbuf_addstr(&deep, "{\"messages\":");
    for (int i = 0; i < 100000; i++)
        strbuf_addch(&deep, '[');
    write_bytes(deep.data, deep.len);
    strbuf_release(&deep);
    refused(true, "invalid_file_format", "deeper than");
}

static void a_file_in_which_everything_is_masked(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, 1 << 16);
    for (int i = 0; i < 12; i++)
        strbuf_addstr(&sb, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":"
                           "\"assistant\",\"content\":\"b\",\"weight\":0}]}\n");
    write_bytes(sb.data, sb.len);
    strbuf_release(&sb);
    refused(false, "invalid_training_file", "There is nothing to learn in it");
}

static void a_line_of_a_gigabyte_is_refused_without_being_held(void **state)
{
    struct rusage before, after;
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, ROW "\n{\"messages", sizeof(ROW) + 11), sizeof(ROW) + 11);
    assert_int_equal(ftruncate(fd, (off_t)1 << 30), 0);
    close(fd);
    getrusage(RUSAGE_SELF, &before);
    refused(false, "invalid_file_format", "Example 2 is longer than 1048576 bytes");
    getrusage(RUSAGE_SELF, &after);
    assert_true(after.ru_maxrss - before.ru_maxrss < 32 * 1024);
}

static void the_longest_line_allowed_is_read(void **state)
{
    static const char head[] = "{\"messages\":[{\"role\":\"user\",\"content\":\"";
    static const char tail[] = "\"},{\"role\":\"assistant\",\"content\":\"b\"}]}\r\n";
    struct engine_dataset_report report;
    struct engine_dataset *dataset;
    struct strbuf sb;

    for (int over = 0; over < 2; over++) {
        strbuf_init(&sb, 1 << 22);
        strbuf_addstr(&sb, head);
        while (sb.len < DATASET_MAX_LINE + 2 - (sizeof(tail) - 1) + (size_t)over)
            strbuf_addch(&sb, sb.len % 7 == 0 ? ' ' : 'a');
        strbuf_addstr(&sb, tail);
        strbuf_addstr(&sb, ROW);
        write_bytes(sb.data, sb.len);
        strbuf_release(&sb);
        if (over) {
            refused(true, "invalid_file_format", "Example 1 is longer");
            continue;
        }
        assert_int_equal(open_with(&dataset, true, 64, &report, NULL), 0);
        assert_int_equal(report.examples, 2);
        assert_int_equal(report.truncated_examples, 1);
        engine_dataset_free(dataset);
    }
}

static int setup(void **state)
{
    char *text = NULL;
    size_t len;
    int rc;

    json_text_setup();
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(path, sizeof(path), "%s/train.jsonl", folder);
    if (file_read_all("tests/golden/tiny_tokenizer.json", 1 << 20, &text, &len, NULL) != 0)
        return -1;
    rc = tokenizer_open(&tokenizer, text, len, NULL);
    free(text);
    return rc != 0 ? -1 : chat_template_open(&chat, NULL, 0, tokenizer, NULL);
}

static int teardown(void **state)
{
    chat_template_free(chat);
    tokenizer_free(tokenizer);
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers_and_their_end_of_turn_are_trained),
        cmocka_unit_test(weight_zero_masks_a_message),
        cmocka_unit_test(parts_of_text_are_joined_and_empty_extras_let_through),
        cmocka_unit_test(control_tokens_in_a_content_stay_text),
        cmocka_unit_test(legacy_rows_are_one_turn_each),
        cmocka_unit_test(line_ends_of_any_kind_read_the_same),
        cmocka_unit_test(the_report_counts_tokens_and_cuts),
        cmocka_unit_test(a_conversation_is_no_question_with_an_answer),
        cmocka_unit_test(too_few_examples),
        cmocka_unit_test(rows_that_are_no_chat),
        cmocka_unit_test(files_of_another_format),
        cmocka_unit_test(a_file_in_which_everything_is_masked),
        cmocka_unit_test(a_line_of_a_gigabyte_is_refused_without_being_held),
        cmocka_unit_test(the_longest_line_allowed_is_read),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
