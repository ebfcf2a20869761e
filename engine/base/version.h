/* version.h: the program's version, as `graft version` and an artifact's created_by say it. */
#ifndef GRAFT_BASE_VERSION_H
#define GRAFT_BASE_VERSION_H

#define GRAFT_VERSION "0.1.0"

#endif
