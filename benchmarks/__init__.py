"""Side-by-side measurements that anybody can run again."""
