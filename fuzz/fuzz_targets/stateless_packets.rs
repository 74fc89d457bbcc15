//! Any packets from the device of stateless clients.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| c1000k_client::play_packets(bytes));
