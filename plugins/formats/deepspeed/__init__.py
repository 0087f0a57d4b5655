"""DeepSpeed's folders."""
