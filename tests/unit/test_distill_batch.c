/* The rows of a step of distillation: which examples, which tokens of them, and what counts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/codec/distill_batch.h"
#include "tests/unit/check.h"
#include "tests/unit/golden.h"

enum { EXAMPLES = 5, WORDS = 20, ANSWER = 4, LENGTH = 3 + WORDS + 5 + ANSWER + 1 };

static struct tokenizer *tokenizer;
static int32_t token[EXAMPLES][LENGTH];
static float weight[LENGTH];

/* <|im_start|> role line words <|im_end|> line <|im_start|> role line answer <|im_end|>; words tell
 * which they are and whose: 100 · (example + 1) + place. */
static void fill(void)
{
    int32_t start = tokenizer_added_token(tokenizer, "<|im_start|>");
    int32_t end = tokenizer_added_token(tokenizer, "<|im_end|>");

    assert_true(tokenizer_is_special(tokenizer, start) && tokenizer_is_special(tokenizer, end));
    for (int32_t e = 0; e < EXAMPLES; e++) {
        for (int32_t i = 0; i < LENGTH; i++)
            token[e][i] = 100 * (e + 1) + i;
        token[e][0] = token[e][WORDS + 5] = start;
        token[e][WORDS + 3] = token[e][LENGTH - 1] = end;
    }
    for (int32_t i = LENGTH - ANSWER - 1; i < LENGTH; i++)
        weight[i] = 1;
}

static struct dataset_example example_at(const void *context, int64_t i)
{
    return (struct dataset_example){.token = token[i], .weight = weight, .length = LENGTH};
}

static const struct trainer_source source = {.count = EXAMPLES, .example = example_at};

static void open_batches(struct distill_batches *b, int32_t max_rows, int64_t seed)
{
    CHECK(distill_batches_open(b, &source, tokenizer, max_rows, seed, &err));
}

static bool is_word(int32_t place)
{
    return place >= 3 && place < 3 + WORDS;
}

/* Of one example of a batch: what is left of it in order, with weights that fit; how many
 * words are left out. */
static int32_t check_example(const struct distill_batch *b, int32_t doc)
{
    int32_t from = b->batch.cu_seqlens[doc], to = b->batch.cu_seqlens[doc + 1], place = 0, out = 0;
    const int32_t *whole = token[b->example[doc]];

    for (int32_t row = from; row < to; row++, place++) {
        while (b->batch.token[row] != whole[place]) {
            assert_true(is_word(place));
            out++;
            place++;
        }
        assert_int_equal(b->batch.position[row], row - from);
        if (row > from)
            assert_true(b->weight[row - 1] ==
                        (weight[place] > 0 ? DISTILL_ANSWERS : 1) * b->weight[from]);
    }
    assert_int_equal(place, LENGTH);
    return out;
}

static void test_every_other_time_it_is_thinned(void **state)
{
    struct distill_batches batches;
    int32_t words = 0, out = 0, last = -1, differs = 0;

    open_batches(&batches, 3 * LENGTH, 7);
    for (int i = 0; i < 200; i++) {
        struct distill_batch b;
        int32_t left_out = 0, thinned = 0;
        float sum = 0;

        distill_batches_next(&batches, &b);
        assert_int_equal(b.batch.docs, 3);
        for (int32_t d = 0; d < b.batch.docs; d++) {
            int32_t found = check_example(&b, d);

            if ((3 * i + d) / EXAMPLES % 2 == 0)
                assert_int_equal(found, 0);
            else
                thinned++;
            left_out += found;
        }
        assert_true(b.thinned == (thinned > 0));
        for (int32_t r = 0; r < b.batch.rows; r++)
            sum += b.weight[r];
        assert_true(sum > 0.9999f && sum < 1.0001f);
        assert_int_equal(b.batch.rows, 3 * LENGTH - left_out);
        words += thinned * WORDS;
        out += left_out;
        if (thinned == 3) {
            differs += last >= 0 && left_out != last;
            last = left_out;
        }
    }
    assert_true(out > (DISTILL_THINNED - 0.03) * words && out < (DISTILL_THINNED + 0.03) * words);
    assert_true(differs > 20); /* drawn anew each time */
    distill_batches_close(&batches);
}

static void test_each_example_in_each_round(void **state)
{
    struct distill_batches batches;
    int32_t seen[EXAMPLES] = {0}, moved = 0;

    open_batches(&batches, LENGTH, 1);
    for (int i = 0; i < 10 * EXAMPLES; i++) {
        struct distill_batch b;

        distill_batches_next(&batches, &b);
        assert_int_equal(b.batch.docs, 1);
        assert_int_equal(seen[b.example[0]]++, i / EXAMPLES);
        moved += b.example[0] != i % EXAMPLES;
    }
    assert_true(moved > 0);
    distill_batches_close(&batches);
}

static void test_a_seed_says_all(void **state)
{
    struct distill_batches one, same, other;
    int32_t differs = 0;

    open_batches(&one, 2 * LENGTH, 3);
    open_batches(&same, 2 * LENGTH, 3);
    open_batches(&other, 2 * LENGTH, 4);
    for (int i = 0; i < 10; i++) {
        struct distill_batch a, b, c;

        distill_batches_next(&one, &a);
        distill_batches_next(&same, &b);
        distill_batches_next(&other, &c);
        assert_int_equal(a.batch.rows, b.batch.rows);
        assert_memory_equal(a.batch.token, b.batch.token, (size_t)a.batch.rows * sizeof(int32_t));
        differs += a.batch.rows != c.batch.rows;
    }
    assert_true(differs > 0);
    distill_batches_close(&one);
    distill_batches_close(&same);
    distill_batches_close(&other);
}

/* More tokens than a step has rows: those of its end. No more examples than there are, however many
 * rows there were for. */
static void test_long_and_few(void **state)
{
    struct distill_batches batches;
    struct distill_batch b;

    open_batches(&batches, LENGTH - 2, 1);
    assert_int_equal(distill_batches_rows(&batches, 0), LENGTH - 2);
    distill_batches_next(&batches, &b);
    assert_int_equal(b.batch.rows, LENGTH - 2);
    assert_memory_equal(b.batch.token, token[b.example[0]] + 2,
                        (LENGTH - 2) * sizeof *b.batch.token);
    assert_int_equal(b.batch.position[0], 0);
    assert_true(b.weight[b.batch.rows - 2] == DISTILL_ANSWERS * b.weight[0]);
    distill_batches_close(&batches);
    open_batches(&batches, 100 * LENGTH, 1);
    assert_int_equal(distill_batches_rows(&batches, 0), LENGTH);
    distill_batches_next(&batches, &b);
    assert_int_equal(b.batch.docs, EXAMPLES);
    distill_batches_close(&batches);
}

static int setup(void **state)
{
    tokenizer = golden_tokenizer("tests/golden/tiny_tokenizer.json");
    fill();
    return 0;
}

static int teardown(void **state)
{
    tokenizer_free(tokenizer);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_other_time_it_is_thinned),
        cmocka_unit_test(test_each_example_in_each_round),
        cmocka_unit_test(test_a_seed_says_all),
        cmocka_unit_test(test_long_and_few),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
