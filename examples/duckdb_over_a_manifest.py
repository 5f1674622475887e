"""Ask a manifest with SQL: nothing is loaded but the columns that a question names.

python examples/duckdb_over_a_manifest.py noisyclean-out keep.parquet     (pip install duckdb)
"""

import sys

import duckdb

out = sys.argv[1] if len(sys.argv) > 1 else "noisyclean-out"
keep = sys.argv[2] if len(sys.argv) > 2 else "keep.parquet"

duckdb.sql(f"create view pairs as from read_parquet('{out}/manifest/**/*.parquet', hive_partitioning = true)")

print("Where do the mismatches come from? Sites, the worst first:")
print(
    duckdb.sql("""
        select regexp_extract(url, '^[a-z]+://([^/]+)', 1) as site, count(*) as pairs,
               round(1 - avg(match_probability), 3) as mismatched
        from pairs where split <> 'unreadable' group by site order by mismatched desc, pairs desc limit 10
    """)
)

print("Are short captions worse?")
print(
    duckdb.sql("""
        select least(len(string_split(caption, ' ')), 20) as words, count(*) as pairs,
               round(avg((split = 'clean')::int), 3) as clean
        from pairs where split <> 'unreadable' group by words order by words
    """)
)

print("The captions that the model is surest are wrong:")
print(duckdb.sql("select shard, key, caption from pairs where split = 'noisy' order by rank desc limit 5"))

duckdb.sql(f"""
    copy (select shard, key from pairs where split = 'clean' order by shard, "index") to '{keep}' (format parquet)
""")
print(f"The keys of the clean pairs are in {keep}")
