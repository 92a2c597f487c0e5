#!/bin/sh
# The header in a project outside of this one, tests/packages/app.c, in each of the ways that README's "Use it in your
# project" has: what is built there is taken from README, with and without TLS, and what was built is run.
#   sh tests/packages.sh [copy] [install] [pkgconfig] [find] [subdirectory] [fetch] [meson]     default: all of them
# Needs cmake, meson, ninja, pkg-config, git, openssl and its headers; what is missing is a failure with CI=true.
# Nothing is fetched from the network. BUILD, CC, CXX.
set -u
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} CXX=${CXX:-c++} build=${BUILD:-build}/packages
export CC CXX
passed=0 failed=0 skipped=0
rm -rf "$build"
mkdir -p "$build" || exit 1
build=$(cd "$build" && pwd)
readme=$PWD/README.md app=$PWD/tests/packages/app.c
# Neither the machine's packages nor its user's settings are meant.
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null
unset CMAKE_PREFIX_PATH PKG_CONFIG_PATH CFLAGS CXXFLAGS LDFLAGS DESTDIR 2>/dev/null

# result STATUS TEXT [FILE]: tell and count it; a failure shows the end of the file.
result() {
    if [ "$1" -eq 0 ]; then
        passed=$((passed + 1))
        echo "$2"
    else
        failed=$((failed + 1))
        echo "FAIL $2"
        [ $# -lt 3 ] || tail -n 12 "$3" | sed 's/^/    /'
    fi
}

# has WHAT TOOL...: true when all are there; else that is skipped, or fails.
has() {
    what=$1
    shift
    for tool; do
        command -v "$tool" >/dev/null && continue
        echo "SKIP $what: no $tool"
        if [ "${CI:-}" = true ]; then failed=$((failed + 1)); else skipped=$((skipped + 1)); fi
        return 1
    done
}

# ---- what is packaged: a copy with a version that no other copy on this machine has, so that it is seen which header
# was compiled, and that every file has the version from there

tree=$build/tree
mkdir "$tree"
cp -R Makefile .cmake .meson .pkgconfig "$tree"
sed 's/^\(#define TSRV_VERSION "[0-9]*\.[0-9]*\)\..*/\1.97"/' tcpserver.h >"$tree/tcpserver.h"
version=$(sed -n 's/^#define TSRV_VERSION "\(.*\)"/\1/p' "$tree/tcpserver.h")
major=${version%%.*} minor=${version#*.}
minor=${minor%.*}

kinds=plain
if ! echo '#include <openssl/ssl.h>' | $CC -E - >/dev/null 2>&1; then
    has 'TLS' openssl/ssl.h
elif has 'TLS' openssl; then
    kinds='plain tls'
    make -s cert BUILD="$build" >"$build/cert.log" 2>&1 || result 1 'a certificate' "$build/cert.log"
fi

# snippet LANGUAGE WORD: the block of README in that language that has the word, for the kind of program, in `snippet`.
snippet() {
    case $1-$kind in
    *-plain) names= ;;
    cmake-tls) names='s/tcpserver::tcpserver/tcpserver::tls/' ;;
    *-tls) names="s/tcpserver\('*)\)/tcpserver-tls\1/" ;;
    esac
    awk -v begin="\`\`\`$1" -v word="$2" '
        /^```/ && inside { inside = 0; if (index(text, word)) { printf "%s", text; found = 1 } }
        inside { text = text $0 "\n" }
        $0 == begin { inside = 1; text = "" }
        END { exit !found }' "$readme" >snippet.md || { echo "README has no $1 block with $2" && return 1; }
    echo "$1 $2" >>"$build/used"
    sed "$names" snippet.md | tee snippet
}

# project NAME [SUFFIX]: a new folder with nothing but the program, as C or, with cpp, C++: `$at`, which is the current
# directory then.
project() {
    at=$build/$1-$kind suffix=${2:-c}
    mkdir "$at" && cd "$at" && cp "$app" "app.$suffix"
}

# runs PROGRAM: does it say what it should?
runs() {
    expected="$version TCP hello" certificate=
    if [ "$kind" = tls ]; then expected="$version TLSv1.3 hello" certificate="$build/cert.pem $build/key.pem"; fi
    # shellcheck disable=SC2086 # two arguments
    got=$(timeout 60 "$1" $certificate)
    [ "$got" = "$expected" ] || { echo "it printed '$got', and not '$expected'" && return 1; }
}

# try NAME SUFFIX FUNCTION...: for each kind: a project in which the function makes the program `app`, which is run.
try() {
    name=$1 suffix=$2
    shift 2
    for kind in $kinds; do
        (project "$name" "$suffix" && "$@" && runs "$(find . -name app -type f)") >"$build/$name-$kind.log" 2>&1
        result $? "$name, $kind" "$build/$name-$kind.log"
    done
}

# ---- the ways

by_copy() {
    libraries=
    [ "$kind" = plain ] || libraries='-DTSRV_TLS_OPENSSL= -lssl -lcrypto'
    # shellcheck disable=SC2086
    $CC -Wall -Wextra -Werror -I "$tree" -o app app.c $libraries
}

by_pkgconfig() {
    snippet sh pkg-config && sh -c "$(sed "s/^cc /$CC -Werror /" snippet)"
}

# by_cmake WORD ARGUMENT...: a project around README's block with that word.
by_cmake() {
    word=$1 language=C
    shift
    [ "$suffix" = c ] || language=CXX
    snippet cmake "$word" || return 1
    {
        echo 'cmake_minimum_required(VERSION 3.14)'
        echo "project(app LANGUAGES $language)"
        echo "add_executable(app app.$suffix)"
        sed "s|https://[^ ]*|file://$tree|; s|GIT_TAG [^ )]*|GIT_TAG packaged|" snippet
    } >CMakeLists.txt
    cmake -S . -B out -D CMAKE_C_FLAGS=-Werror -D CMAKE_CXX_FLAGS=-Werror "$@" && cmake --build out
}

by_subdirectory() { cp -R "$tree" tcpserver && by_cmake add_subdirectory; }

by_meson() {
    language=c
    [ "$suffix" = c ] || language=cpp
    snippet meson dependency || return 1
    {
        echo "project('app', '$language')"
        sed "s/app\.c/app.$suffix/" snippet
    } >meson.build
    meson setup -D werror=true out && ninja -C out
}

by_wrap() {
    mkdir subprojects && cp -R "$tree/.meson/"* subprojects/ &&
        sed -i.old "s|^url = .*|url = file://$tree|; s|^revision = .*|revision = packaged|" subprojects/*.wrap &&
        by_meson
}

# ---- the scenarios

test_copy() { try 'cc -I' c by_copy; }

# installed PREFIX [SETTING...]: install the copy.
installed() {
    prefix=$1
    shift
    make -s -C "$tree" install PREFIX="$prefix" "$@" >"$build/install.log" 2>&1 ||
        result 1 "make install PREFIX=$prefix" "$build/install.log"
}

# One to be moved to its place, as packagers do, one in its place, one with the header in a folder of its own.
install_all() {
    [ ! -d "$build/staged" ] || return 0
    installed /opt/it DESTDIR="$build/staged"
    installed "$build/placed"
    installed "$build/apart" includedir="$build/apart/include/tcpserver-0"
}

test_install() {
    install_all
    find "$build/staged" "$build/placed" "$build/apart" -type f | sed "s|^$build||" | sort >"$build/files"
    share='share/cmake/tcpserver/tcpserver-config-version.cmake share/cmake/tcpserver/tcpserver-config.cmake
        share/pkgconfig/tcpserver-tls.pc share/pkgconfig/tcpserver.pc'
    for place in apart/include/tcpserver-0 placed/include staged/opt/it/include; do
        echo "/$place/tcpserver.h"
        for other in $share; do echo "/${place%%/include*}/$other"; done
    done | sort | diff - "$build/files" >"$build/files.log"
    result $? 'make install: all files, and no others' "$build/files.log"
    ! grep -r '@[a-z]*@' "$build/placed/share" >"$build/files.log" 2>&1
    result $? 'make install: every place in them is filled in' "$build/files.log"
    installed /opt/it DESTDIR="$build/gone"
    make -s -C "$tree" uninstall PREFIX=/opt/it DESTDIR="$build/gone" >"$build/install.log" 2>&1 &&
        find "$build/gone" ! -type d -o -name '*tcpserver*' >"$build/gone.log" && [ ! -s "$build/gone.log" ]
    result $? 'make uninstall: nothing is left' "$build/gone.log"
}

test_pkgconfig() {
    has pkg-config pkg-config || return
    install_all
    export PKG_CONFIG_PATH="$build/placed/share/pkgconfig"
    for package in tcpserver tcpserver-tls; do
        [ "$(pkg-config --modversion $package)" = "$version" ]
        result $? "pkg-config: the version of $package is the header's"
    done
    ! pkg-config --exists "tcpserver > $version" && pkg-config --exists "tcpserver >= $version"
    result $? 'pkg-config: a version too new is not there'
    # An older C library has threads in another one.
    pkg-config --libs tcpserver | grep -q -e -pthread
    result $? 'pkg-config: threads are linked'
    try 'pkg-config' c by_pkgconfig
    export PKG_CONFIG_PATH="$build/apart/share/pkgconfig"
    try 'pkg-config, includedir' c by_pkgconfig
    export PKG_CONFIG_PATH="$build/staged/opt/it/share/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$build/staged"
    try 'pkg-config, DESTDIR' c by_pkgconfig
    unset PKG_CONFIG_PATH PKG_CONFIG_SYSROOT_DIR
}

# asked VERSION: the line by which versions.cmake's project says whether that was found.
asked() { grep -e "-- asked '$1': " "$build/versions.log"; }
found() { asked "$1" | grep -qi ': \(true\|1\|on\)$'; }
refused() { asked "$1" | grep -qi ': \(false\|0\|off\|\)$'; }

# Which versions and components there are, by find_package itself.
versions() {
    older=$((major - 1)).9
    [ "$major" != 0 ] || older=0.$((minor - 1))
    newer=$major.$((minor + 1))
    mkdir -p "$build/versions"
    cat >"$build/versions/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.19)
project(versions LANGUAGES C)
foreach(asked "" $major.$minor "$version EXACT" $major.$minor.98 $newer $((major + 1)).0 $older
        $older...$newer $older...<$version $older...$version COMPONENTS\ tls COMPONENTS\ other)
    string(REPLACE " " ";" arguments "\${asked}")
    find_package(tcpserver \${arguments} QUIET)
    message(STATUS "asked '\${asked}': \${tcpserver_FOUND}")
endforeach()
CMAKE
    rm -rf "$build/versions/out"
    cmake -S "$build/versions" -B "$build/versions/out" -D CMAKE_PREFIX_PATH="$build/placed" "$@" \
        >"$build/versions.log" 2>&1
}

find_versions() {
    versions -D CMAKE_DISABLE_FIND_PACKAGE_OpenSSL=ON
    for asked in '' "$major.$minor" "$version EXACT" "$older...$newer" "$older...$version"; do
        found "$asked"
        result $? "find_package: there is '$asked'" "$build/versions.log"
    done
    for asked in "$major.$minor.98" "$newer" "$((major + 1)).0" "$older" "$older...<$version" 'COMPONENTS other'; do
        refused "$asked"
        result $? "find_package: there is no '$asked'" "$build/versions.log"
    done
    refused 'COMPONENTS tls'
    result $? "find_package: there is no 'COMPONENTS tls' without OpenSSL" "$build/versions.log"
    [ "$kinds" != plain ] || return
    versions && found 'COMPONENTS tls' && refused 'COMPONENTS other'
    result $? "find_package: there is 'COMPONENTS tls' with OpenSSL" "$build/versions.log"
}

test_find() {
    has find_package cmake || return
    install_all
    find_versions
    try 'find_package' c by_cmake find_package -D CMAKE_PREFIX_PATH="$build/placed"
    try 'find_package, includedir' c by_cmake find_package -D CMAKE_PREFIX_PATH="$build/apart"
    try 'find_package, DESTDIR' c by_cmake find_package -D CMAKE_PREFIX_PATH="$build/staged/opt/it"
}

test_subdirectory() {
    has add_subdirectory cmake || return
    try 'add_subdirectory' c by_subdirectory
    try 'add_subdirectory, C++' cpp by_subdirectory
}

# What git clones.
repository() {
    [ ! -d "$tree/.git" ] || return 0
    (cd "$tree" && git init -q && git add -A &&
        git -c user.name=packages -c user.email=packages@localhost commit -qm packaged && git tag packaged)
}

test_fetch() {
    has FetchContent cmake git || return
    repository
    try 'FetchContent' c by_cmake FetchContent
    try 'FetchContent, a folder' c by_cmake FetchContent -D FETCHCONTENT_SOURCE_DIR_TCPSERVER="$tree"
}

test_meson() {
    has Meson meson ninja git pkg-config || return
    repository
    install_all
    try 'Meson' c by_wrap
    try 'Meson, C++' cpp by_wrap
    export PKG_CONFIG_PATH="$build/placed/share/pkgconfig"
    try 'Meson, installed' c by_meson
    unset PKG_CONFIG_PATH
}

# With all scenarios every block of README was used, unless a tool is missing.
test_blocks() {
    [ $skipped -eq 0 ] || return
    blocks=$(grep -c -e '^```sh$' -e '^```cmake$' -e '^```meson$' "$readme")
    [ "$blocks" = "$(sort -u "$build/used" | wc -l)" ]
    result $? "README: all its $blocks blocks of sh, cmake and meson were used"
}

# shellcheck disable=SC2048
for scenario in ${*:-copy install pkgconfig find subdirectory fetch meson}; do
    case $scenario in
    copy | install | pkgconfig | find | subdirectory | fetch | meson) "test_$scenario" ;;
    *) echo "no such scenario: $scenario" && exit 2 ;;
    esac
done
[ $# -gt 0 ] || test_blocks
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
