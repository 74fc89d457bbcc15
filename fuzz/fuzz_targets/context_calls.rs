//! Any sequence of context calls, in callbacks and between turns, on a fake kernel that does what the same bytes say.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| reactor::play_bytes(bytes));
