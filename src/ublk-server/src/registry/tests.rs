use super::*;
use crate::paths::Paths;
use accel_oci::DiffId;
use accel_source::{Arena, Done, Patience, Request, Source};
use accel_transport::Wanted;
use accel_ufs::index::ImageSize;
use accel_ufs::names::LayerName;
use std::fs;
use std::path::Path;
use std::time::Duration;

const ROOT: Root = Root([7; 32]);

struct NoSource;

impl Source for NoSource {
    fn submit(&self, _: Request, _: Done) {}

    fn name(&self) -> &str {
        "nothing"
    }
}

/// A registry with one export, whose journal is real and whose device is not.
fn registry(paths: &Paths) -> Registry {
    let engine = Engine::start(
        Arc::new(NoSource),
        Arc::new(Arena::new(1, 1).unwrap()),
        Patience::DATA,
    );
    let engine = engine.unwrap();
    let devices = Devices::start(Wanted::Fuse, paths, Duration::ZERO, true).unwrap();
    let journal = Journal::open(&paths.run, Path::new("/ufs")).unwrap();
    let name = LayerName::Layer(DiffId(Digest::of(b"layer")));
    let size = ImageSize::new(4096).unwrap();
    let served = Served {
        export: Arc::new(Export::recovered(name, ROOT, size)),
        device: Device::Fuse,
        entry: Some(Entry::new(&journal, name, ROOT, size)),
    };
    let threads = Arc::new(Threads::start(0).unwrap());
    let registry = Registry::new(engine, devices, journal, "/ufs".into(), threads).unwrap();
    registry.state().exports.insert(ROOT, served);
    registry
}

fn paths(directory: &Path) -> Paths {
    Paths::new(&directory.join("socket"), Some(directory.to_owned()))
}

fn holding() -> Holding {
    Holding {
        image: "oci:/x".to_owned(),
        manifest: Digest::of(b"manifest"),
        layers: vec![ROOT],
        signed: false,
        ready: None,
    }
}

/// Holders in memory and on disk.
fn holders(registry: &Registry) -> (Vec<String>, Vec<String>) {
    let memory = registry.state().holders.keys().cloned().collect();
    let entries = registry.journal.load().unwrap();
    let disk = entries.iter().flat_map(|entry| &entry.holders);
    (memory, disk.map(|holder| holder.holder.clone()).collect())
}

#[test]
fn memory_and_journal_agree_also_after_a_failed_write() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(&paths(directory.path()));
    let journal = directory.path().join("journal");
    let broken = |what: &dyn Fn() -> Result<()>| {
        fs::rename(&journal, directory.path().join("away")).unwrap();
        assert!(what().is_err());
        fs::rename(directory.path().join("away"), &journal).unwrap();
    };
    broken(&|| registry.hold("/a", holding()));
    assert_eq!(holders(&registry), (vec![], vec![]));
    registry.hold("/a", holding()).unwrap();
    let a = vec!["/a".to_owned()];
    assert_eq!(holders(&registry), (a.clone(), a.clone()));
    // Whoever holds it already still does when asking again fails.
    broken(&|| {
        registry
            .hold("/a", holding())
            .and(registry.hold("/b", holding()))
    });
    assert_eq!(holders(&registry), (a.clone(), a.clone()));
    registry.hold("/b", holding()).unwrap();
    broken(&|| registry.detach(&Holder::Mount("/b".to_owned())).map(drop));
    registry.hold("/a", holding()).unwrap();
    assert_eq!(holders(&registry), (a.clone(), a));
}

#[test]
fn what_was_unmounted_without_a_daemon_ends() {
    let directory = tempfile::tempdir().unwrap();
    let paths = paths(directory.path());
    let registry = registry(&paths);
    let attach = operator(&holding().manifest);
    for holder in ["/gone", "/there", &attach] {
        registry.hold(holder, holding()).unwrap();
    }
    fs::create_dir(paths.mounts()).unwrap();
    fs::write(paths.note(Path::new("/there")), "{}").unwrap();
    registry.forget_unmounted(&paths);
    let left = vec!["/there".to_owned(), attach.clone()];
    assert_eq!(holders(&registry), (left.clone(), left));
    registry.state().holders.remove(&attach);
    fs::remove_file(paths.note(Path::new("/there"))).unwrap();
    registry.forget_unmounted(&paths);
    assert_eq!(holders(&registry), (vec![], vec![]));
    assert!(registry.state().exports.is_empty());
}

#[test]
fn nothing_is_attached_once_the_daemon_ends() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Arc::new(registry(&paths(directory.path())));
    assert_eq!(registry.shut_down(), 0);
    let image = Digest::of(b"manifest").to_string();
    let error = registry.attach(&image, None).unwrap_err().to_string();
    assert!(error.contains("ending"), "{error}");
}
