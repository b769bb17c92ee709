//! The guide: pages that stand in the repository as Markdown and are shown here as modules.
//!
//! README leads to the same files. Each fact stands in one place: what a module does is in its own
//! documentation, what an operator or a contributor needs is here.

// A page names its links at its end, for readers of the repository. Here the same names come first, so
// they win and lead to modules.
macro_rules! pages {
    ($($(#[$summary:meta])* $name:ident: $file:literal;)*) => {$(
        $(#[$summary])*
        ///
        /// [adding-a-version]: crate::storage::wal#adding-a-format-version
        /// [application]: crate::ports::application
        /// [changelog]: crate::guide::changelog
        /// [command-line]: crate::guide::operating#the-command-line
        /// [contributing]: crate::guide::contributing
        /// [httpapi]: crate::httpapi
        /// [kvstore]: crate::kvstore#adding-a-command
        /// [upgrading]: crate::guide::upgrading
        /// [performance]: crate::guide::performance#measure-it-yourself
        /// [snapshotter]: crate::storage::snapshotter
        /// [state-machine]: crate::raft_node::state_machine
        /// [tokens]: crate::kvstore::Token
        /// [tour]: crate
        /// [wal]: crate::storage::wal
        #[doc = include_str!($file)]
        pub mod $name {}
    )*};
}

pages! {
    applications: "applications.md";
    machines: "machines.md";
    operating: "operating.md";
    upgrading: "upgrading.md";
    security: "security.md";
    testing: "testing.md";
    performance: "performance.md";
    profile: "profile.md";
    differences: "differences.md";
    contributing: "contributing.md";
    changelog: "changelog.md";
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    /// The anchor that GitHub and rustdoc give a heading.
    fn anchor(heading: &str) -> String {
        let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
        heading.trim().to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
    }

    /// What a page links to beside other sites: targets in parentheses, and those after a name.
    fn targets(page: &str) -> Vec<&str> {
        let inline = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let named = page.lines().filter(|line| line.starts_with('['));
        let named = named.filter_map(|line| line.split_once("]: ").map(|(_, target)| target));
        inline.chain(named).filter(|target| !target.contains("://")).collect()
    }

    /// README and the guide.
    fn pages() -> Vec<PathBuf> {
        let top = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut pages = vec![top.join("README.md")];
        let files = std::fs::read_dir(top.join("src/guide")).expect("the guide");
        pages.extend(files.map(|file| file.expect("a page").path()));
        pages.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
        assert_eq!(pages.len(), 12, "{pages:?}");
        pages
    }

    #[test]
    fn every_source_that_a_page_names_exists() {
        for page in pages() {
            let text = std::fs::read_to_string(&page).expect("a page");
            for name in text.split('`').skip(1).step_by(2) {
                if ["src/", "tests/", "examples/"].iter().any(|folder| name.starts_with(folder)) {
                    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
                    assert!(path.exists(), "{} names {name}", page.display());
                }
            }
        }
    }

    #[test]
    fn every_link_of_a_page_leads_to_a_file_and_a_heading() {
        for page in pages() {
            let text = std::fs::read_to_string(&page).expect("a page");
            for target in targets(&text) {
                let (file, heading) = target.split_once('#').unwrap_or((target, ""));
                let path = if file.is_empty() {
                    page.clone()
                } else {
                    page.parent().expect("a folder").join(file)
                };
                assert!(path.exists(), "{} links to {target}", page.display());
                if !heading.is_empty() {
                    let text = std::fs::read_to_string(&path).expect("a page");
                    let mut headings = text.lines().filter(|line| line.starts_with('#'));
                    assert!(
                        headings.any(|line| anchor(line.trim_start_matches('#')) == heading),
                        "{} links to {target}",
                        page.display()
                    );
                }
            }
        }
    }
}
