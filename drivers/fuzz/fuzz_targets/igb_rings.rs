#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vireo_fuzz::igb_rings(data));
