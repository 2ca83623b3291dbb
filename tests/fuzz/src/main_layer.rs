//! `tools/fuzz layer`: see the module `layer`.
#![no_main]

mod erofs;
mod layer;
mod tar;

libfuzzer_sys::fuzz_target!(|blob: &[u8]| layer::run(blob));

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    tar::mutate(data, size, max_size, seed)
});
