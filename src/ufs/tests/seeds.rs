//! The seeds of the fuzz target `index` (`tests/fuzz`), each run once as the fuzzer would.

#[path = "../../../tests/fuzz/src/index.rs"]
mod index;

use std::{fs, path::Path};

#[test]
fn indexes_and_records() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/index");
    let mut count = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        // Named if it panics.
        eprintln!("{}", path.display());
        index::run(&fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "no seeds");
}
