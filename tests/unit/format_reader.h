/* format_reader.h: the Python program in api-spec/delta-format.md, which reads a delta file with
 * nothing but the page: what it makes of a file is held to what the program does. */
#ifndef GRAFT_TESTS_FORMAT_READER_H
#define GRAFT_TESTS_FORMAT_READER_H

/* Skips the test where there is no python3. */
void format_reader_need_python(void);
/* The program, as a file. It must be short: a format that takes more is not simple. */
void format_reader_write(const char *path);

#endif
