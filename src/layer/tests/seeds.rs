//! The seeds of the fuzz targets (`tests/fuzz`), each run once as the fuzzer would.

#[path = "../../../tests/fuzz/src/erofs.rs"]
mod erofs;
#[path = "../../../tests/fuzz/src/layer.rs"]
mod layer;

use std::{fs, path::Path};

fn each_seed(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fuzz/corpus")
        .join(target);
    let mut count = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        // Named if it panics.
        eprintln!("{}", path.display());
        run(&fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "no seeds");
}

#[test]
fn layers() {
    each_seed("layer", layer::run);
}

#[test]
fn images() {
    each_seed("erofs", erofs::run);
}
