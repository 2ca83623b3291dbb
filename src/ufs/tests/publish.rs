//! Publication and look-up on a real directory.

use accel_oci::{ChainId, DiffId, Digest, ImageSource, Platform};
use accel_ufs::UfsError;
use accel_ufs::index::{ByteRange, ChunkNo, IndexBuilder};
use accel_ufs::lease::{self, FoundLease, Sign};
use accel_ufs::names::{self, LayerName, Nanoseconds, RelPath};
use accel_ufs::publish::{Outcome, Ufs};
use accel_ufs::record::{ImageRecord, NameRecord, Process};
use accel_ufs::resolve::{ImageName, canonical};
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Barrier;
use tempfile::TempDir;

fn ufs() -> (TempDir, Ufs) {
    let directory = TempDir::new().unwrap();
    let ufs = Ufs::open(directory.path()).unwrap();
    (directory, ufs)
}

fn rel(text: &str) -> RelPath {
    text.parse().unwrap()
}

fn temporaries(directory: &Path) -> usize {
    fs::read_dir(directory.join("tmp")).map_or(0, Iterator::count)
}

fn layer(seed: &[u8]) -> (DiffId, ChainId, LayerName, LayerName) {
    let diff_id = DiffId(Digest::of(seed));
    let below = ChainId::new(None, DiffId(Digest::of(b"below")));
    let chain_id = ChainId::new(Some(below), diff_id);
    let (layer, chain) = (LayerName::Layer(diff_id), LayerName::Chain(chain_id));
    (diff_id, chain_id, layer, chain)
}

fn record(manifest: Digest) -> ImageRecord {
    ImageRecord {
        layout: 1,
        manifest,
        config: manifest,
        platform: Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            variant: None,
        },
        source: String::new(),
        process: Process::default(),
        layers: Vec::new(),
    }
}

#[test]
fn a_published_file_is_whole_and_its_temporary_is_gone() {
    let (directory, ufs) = ufs();
    let name = rel("layers/sha256/ab/x.erofs");
    let publication = ufs.create("x.erofs").unwrap();
    publication.file().write_all(b"bytes").unwrap();
    assert!(!ufs.path(&name).exists());
    assert_eq!(temporaries(directory.path()), 1);
    assert_eq!(publication.commit(&name).unwrap(), Outcome::Published);
    drop(publication);
    assert_eq!(fs::read(ufs.path(&name)).unwrap(), b"bytes");
    assert_eq!(temporaries(directory.path()), 0);
}

#[test]
fn what_is_published_is_never_replaced() {
    let (directory, ufs) = ufs();
    let name = rel("images/x.json");
    ufs.publish(&name, b"first").unwrap();
    let again = ufs.publish(&name, b"fir5t").unwrap();
    assert_eq!(again, Outcome::AlreadyThere);
    let error = ufs.publish(&name, b"longer").unwrap_err();
    assert!(matches!(
        error,
        UfsError::Differs {
            there: 5,
            here: 6,
            ..
        }
    ));
    assert_eq!(fs::read(ufs.path(&name)).unwrap(), b"first");
    assert_eq!(temporaries(directory.path()), 0);
}

#[test]
fn what_is_not_committed_is_gone() {
    let (directory, ufs) = ufs();
    drop(ufs.create("x").unwrap());
    assert_eq!(temporaries(directory.path()), 0);
    let open = ufs.create("x").unwrap();
    ufs.remove_temporaries();
    assert_eq!(temporaries(directory.path()), 0);
    assert!(matches!(open.commit(&rel("x")), Err(UfsError::Interrupted)));
    assert!(matches!(ufs.create("y"), Err(UfsError::Interrupted)));
    assert!(!directory.path().join("x").exists());
}

#[test]
fn a_temporary_names_the_lease_of_its_maker() {
    let (directory, ufs) = ufs();
    assert!(ufs.leases().unwrap().is_empty());
    let open = ufs.create("a.b.erofs").unwrap();
    let stranger = directory.path().join("tmp/stranger");
    fs::write(&stranger, b"").unwrap();
    let found = ufs.temporaries().unwrap();
    let ours = found.iter().find(|t| t.path == open.path()).unwrap();
    assert_eq!(ours.owner.as_ref(), Some(ufs.owner()));
    assert!(
        found
            .iter()
            .any(|t| t.path == stranger && t.owner.is_none())
    );
    let [lease] = &ufs.leases().unwrap()[..] else {
        panic!("not one lease");
    };
    assert_eq!(lease.owner.as_ref(), Some(ufs.owner()));
    assert_eq!(lease.look().unwrap(), Some(Sign::Held));
    // The next in the same process has another lease.
    let other = Ufs::open(directory.path()).unwrap();
    let _open = other.create("x").unwrap();
    assert_eq!(ufs.leases().unwrap().len(), 2);
    drop((open, ufs));
    assert_eq!(other.leases().unwrap().len(), 1);
    assert_eq!(lease.look().unwrap(), None);
}

#[test]
fn a_lease_is_known_by_its_lock_here_and_by_its_renewal_elsewhere() {
    let (directory, ufs) = ufs();
    let now = ufs.clock().unwrap();
    let path = |name: &str| directory.path().join("leases").join(name);
    let owner = ufs.owner();
    let sign = |name: &str, age| {
        let path = path(name);
        let file = fs::File::create(&path).unwrap();
        file.set_modified(now - age).unwrap();
        drop(file);
        let found = ufs.leases().unwrap();
        let found: Vec<&FoundLease> = found.iter().filter(|l| l.path == path).collect();
        found[0].look().unwrap().unwrap()
    };
    let age = lease::EXPIRY;
    let here = format!("other-name.{}.1.00", owner.boot_id);
    assert_eq!(sign(&here, age), Sign::Abandoned);
    let there = format!("{}.another-boot.{}.00", owner.host, owner.pid);
    assert_eq!(sign(&there, age), Sign::Renewed(now - age));
    assert!(ufs.clock().unwrap() >= now);
}

#[test]
fn a_temporary_that_gc_removed_is_said_to_be_and_gets_no_name() {
    let (directory, ufs) = ufs();
    let open = ufs.create("x").unwrap();
    fs::remove_file(open.path()).unwrap();
    let error = open.commit(&rel("x")).unwrap_err();
    assert!(matches!(error, UfsError::TakenForDead { .. }), "{error}");
    assert!(!directory.path().join("x").exists());
}

#[test]
fn a_ufs_that_vanished_is_not_made_anew() {
    let (directory, ufs) = ufs();
    let open = ufs.create("x").unwrap();
    let moved = directory.path().with_extension("moved");
    fs::rename(directory.path(), &moved).unwrap();
    fs::create_dir(directory.path()).unwrap();
    for error in [
        open.commit(&rel("a/x")).unwrap_err(),
        ufs.create("y").unwrap_err(),
        ufs.clock().unwrap_err(),
    ] {
        assert!(matches!(error, UfsError::Vanished { .. }), "{error}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    fs::remove_dir_all(moved).unwrap();
}

#[test]
fn a_ufs_that_is_not_there_is_not_made() {
    let directory = TempDir::new().unwrap();
    let missing = directory.path().join("mnt");
    let error = Ufs::open(&missing).unwrap_err();
    assert!(matches!(error, UfsError::Missing { .. }));
    assert!(error.to_string().contains("mount"), "{error}");
    assert!(!missing.exists());
    fs::write(&missing, b"").unwrap();
    let error = Ufs::open(&missing).unwrap_err();
    assert!(matches!(error, UfsError::NotADirectory { .. }));
}

#[test]
fn errors_name_the_path_and_what_to_do() {
    let (directory, ufs) = ufs();
    fs::write(directory.path().join("layers"), b"").unwrap();
    let error = ufs.publish(&rel("layers/x"), b"").unwrap_err().to_string();
    let path = directory.path().join("layers");
    assert!(error.contains(path.to_str().unwrap()), "{error}");

    let full = std::io::Error::from_raw_os_error(28);
    let error = UfsError::io("write", Path::new("/x/y"))(full).to_string();
    assert!(
        error.contains("\"/x/y\"") && error.contains("make room"),
        "{error}"
    );
}

#[test]
fn a_layer_is_there_when_its_index_is_and_the_chain_comes_first() {
    let (_directory, ufs) = ufs();
    let (diff_id, chain_id, layer, chain) = layer(b"x");
    let find = || ufs.find_layer(diff_id, chain_id).unwrap();
    ufs.publish(&layer.image(), &[0; 4096]).unwrap();
    assert_eq!(find(), None);
    let mut builder = IndexBuilder::new();
    builder.add(ChunkNo(0), &[0; 4096]).unwrap();
    let (root, index) = builder.finish(4096, ByteRange::new(0, 0)).unwrap();
    ufs.publish(&layer.index(), &index).unwrap();
    assert_eq!(find(), Some(layer));
    assert_eq!(ufs.index_header(&layer).unwrap().root(), root);
    ufs.publish(&chain.index(), b"").unwrap();
    assert_eq!(find(), Some(chain));
    let error = ufs.index_header(&chain).unwrap_err().to_string();
    assert!(error.contains(chain.index().as_str()), "{error}");
}

#[test]
fn the_last_conversion_of_a_source_counts() {
    let (_directory, ufs) = ufs();
    let source: ImageSource = "docker://h/r".parse().unwrap();
    let name = ImageName::Source(source.clone());
    let error = ufs.resolve(&name).unwrap_err().to_string();
    assert!(error.contains("convert docker://h/r:latest"), "{error}");

    // A record from a machine whose clock is an hour ahead.
    let ahead = Nanoseconds(u64::MAX / 2);
    for (at, seed) in [(Some(ahead), b"1"), (None, b"2"), (None, b"3")] {
        let manifest = Digest::of(seed);
        let json = record(manifest).to_json();
        ufs.publish(&names::image_record(&manifest), &json).unwrap();
        let json = NameRecord {
            layout: 1,
            source: source.to_string(),
            manifest,
        }
        .to_json();
        match at {
            Some(at) => drop(
                ufs.publish(&names::name_record(&source, at), &json)
                    .unwrap(),
            ),
            None => ufs.publish_name(&source, &json).unwrap(),
        }
        assert_eq!(ufs.resolve(&name).unwrap().manifest, manifest);
        let digest = ImageName::Manifest(manifest);
        assert_eq!(ufs.resolve(&digest).unwrap().manifest, manifest);
    }
    assert_eq!(ufs.images().unwrap().len(), 3);
}

#[test]
fn a_record_under_a_wrong_name_is_refused() {
    let (_directory, ufs) = ufs();
    let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
    ufs.publish(&names::image_record(&a), &record(b).to_json())
        .unwrap();
    let error = ufs.image_record(&a).unwrap_err().to_string();
    assert!(error.contains(&b.to_string()), "{error}");
    assert!(error.contains(&a.hex()), "{error}");
}

#[test]
fn a_name_record_of_another_source_is_refused() {
    let (_directory, ufs) = ufs();
    let manifest = Digest::of(b"a");
    let json = record(manifest).to_json();
    ufs.publish(&names::image_record(&manifest), &json).unwrap();
    let source: ImageSource = "docker://h/r".parse().unwrap();
    let json = NameRecord {
        layout: 1,
        source: "docker://h/other:latest".into(),
        manifest,
    };
    ufs.publish_name(&source, &json.to_json()).unwrap();
    let error = ufs.resolve(&ImageName::Source(source)).unwrap_err();
    assert!(error.to_string().contains("docker://h/other"), "{error}");
}

#[test]
fn a_layout_directory_is_known_by_its_real_path() {
    let directory = TempDir::new().unwrap();
    let real = directory.path().canonicalize().unwrap().join("real");
    fs::create_dir(&real).unwrap();
    symlink(&real, real.with_file_name("link")).unwrap();
    let canonical = |text: String| canonical(&text.parse().unwrap());
    let wanted = format!("oci:{}:v1", real.display());
    let dir = real.parent().unwrap().display();
    for text in [
        format!("oci:{dir}/real:v1"),
        format!("oci:{dir}/link:v1"),
        format!("oci:{dir}/link/../real/.:v1"),
    ] {
        assert_eq!(canonical(text).unwrap().to_string(), wanted);
    }
    fs::remove_dir(&real).unwrap();
    let gone = canonical(format!("oci:{dir}/real:v1")).unwrap();
    assert_eq!(gone.to_string(), wanted);
    let relative = canonical("oci:gone".into()).unwrap().to_string();
    assert!(relative.starts_with("oci:/"), "{relative}");

    fs::create_dir(directory.path().join("a:b")).unwrap();
    symlink("a:b", directory.path().join("plain")).unwrap();
    let error = canonical(format!("oci:{dir}/plain")).unwrap_err();
    assert!(matches!(error, UfsError::SourcePath { .. }), "{error}");
}

#[test]
fn only_the_own_claim_is_taken_back() {
    use accel_ufs::claim::{BY_HAND, ClaimName, ClaimRecord};
    let (_directory, ufs) = ufs();
    let name: ClaimName = format!("{BY_HAND}/image").parse().unwrap();
    let of = |source: &str| ClaimRecord {
        names: vec![source.to_owned()],
        ..ClaimRecord::of_layers(&[])
    };
    let first = ufs.claim(&name, &of("one")).unwrap();
    assert!(first.is_some());
    assert_eq!(ufs.claim(&name, &of("one")).unwrap(), None);
    let second = ufs.claim(&name, &of("two")).unwrap().unwrap();
    ufs.unclaim(&second).unwrap();
    let left = ufs.claims().unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].record, of("one"));
    assert!(!left[0].going);
}

/// Several repair the same file at once: what goes aside is what was damaged, never what
/// another has just put there.
#[test]
fn only_what_is_damaged_goes_aside() {
    let (directory, _) = ufs();
    let name = rel("layers/sha256/ab/file.erofs");
    let path = name.beneath(directory.path());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let repairers = 4;
    for round in 0..100 {
        let _ = fs::remove_file(&path);
        fs::write(&path, b"bad!").unwrap();
        let start = Barrier::new(repairers);
        std::thread::scope(|scope| {
            for _ in 0..repairers {
                scope.spawn(|| {
                    let ufs = Ufs::open(directory.path()).unwrap();
                    let publication = ufs.create("file").unwrap();
                    publication.file().write_all(b"good").unwrap();
                    start.wait();
                    publication.replace(&name).unwrap();
                });
            }
        });
        assert_eq!(fs::read(&path).unwrap(), b"good", "round {round}");
        let aside: Vec<_> = fs::read_dir(directory.path().join("quarantine"))
            .unwrap()
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .collect();
        assert_eq!(aside, vec![b"bad!"; round + 1], "round {round}");
    }
}
