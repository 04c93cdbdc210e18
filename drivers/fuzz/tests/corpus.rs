//! Runs the committed corpus without a fuzzer.

use std::path::Path;

#[test]
fn no_input_of_the_corpus_breaks_a_promise() {
    for (name, target) in vireo_fuzz::TARGETS {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut inputs = 0;
        for entry in std::fs::read_dir(&dir).expect("a folder for each target") {
            let path = entry.expect("a folder that can be read").path();
            println!("{}", path.display());
            target(&std::fs::read(path).expect("a file that can be read"));
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no corpus");
    }
}
