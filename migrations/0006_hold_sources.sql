-- Creating a job holds the rows whose bytes it will need (SELECT … FOR KEY SHARE) until its own row is
-- there to keep them; else a deletion and a collection could pass between the two. PostgreSQL asks for
-- the right to update one column for that lock. Nothing updates these.
GRANT UPDATE (status) ON file TO graft_app;
GRANT UPDATE (artifact_bytes) ON model, checkpoint TO graft_app;
